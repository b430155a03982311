{{- define "taxiway.name" -}}
{{ .Release.Name | trunc 30 | trimSuffix "-" }}
{{- end }}

{{/* What may be named once in a cluster: the namespace is part of it. */}}
{{- define "taxiway.clusterName" -}}
{{ .Release.Namespace }}-{{ include "taxiway.name" . }}
{{- end }}

{{- define "taxiway.queues" -}}
{{ pick .Values "hardware" "service" "default_service" "tenants" "limits" "rebalance" "plan" "webhooks" | toYaml }}
{{- end }}

{{/* Labels of one component: what selectors read. */}}
{{- define "taxiway.selector" -}}
app.kubernetes.io/name: taxiway
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "taxiway.labels" -}}
{{ include "taxiway.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- define "taxiway.image" -}}
{{ .root.Values.image.registry }}/{{ .image }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* A pod at the Pod Security level `restricted`; a token only for an `account` of its own. */}}
{{- define "taxiway.pod" -}}
serviceAccountName: {{ .account | default (include "taxiway.name" .root) }}
automountServiceAccountToken: {{ not (empty .account) }}
enableServiceLinks: false
priorityClassName: {{ include "taxiway.clusterName" .root }}-{{ .priority }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{ range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .user | default 10001 }}
  runAsGroup: {{ .user | default 10001 }}
  fsGroup: {{ .user | default 10001 }}
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "taxiway.confined" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "taxiway.brokerEnv" -}}
{{- if .Values.valkey.enabled }}
- name: VALKEY_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ .Values.secret }}, key: VALKEY_PASSWORD}}
- name: TAXIWAY_BROKER
  value: redis://default:$(VALKEY_PASSWORD)@{{ include "taxiway.name" . }}-valkey:6379/0
{{- else }}
- name: TAXIWAY_BROKER
  valueFrom: {secretKeyRef: {name: {{ .Values.secret }}, key: TAXIWAY_BROKER}}
{{- end }}
- name: TAXIWAY_SECRET
  valueFrom: {secretKeyRef: {name: {{ .Values.secret }}, key: TAXIWAY_SECRET}}
{{- end }}

{{/* The private keys of sealed labels, if there are any. */}}
{{- define "taxiway.sealEnv" -}}
- name: TAXIWAY_SEAL_KEYS
  valueFrom: {secretKeyRef: {name: {{ .Values.secret }}, key: TAXIWAY_SEAL_KEYS, optional: true}}
{{- end }}

{{/* What every process of the fleet reads: queues.yaml, and models where they are not the image's. */}}
{{- define "taxiway.fleetMounts" -}}
- {name: queues, mountPath: /app/queues.yaml, subPath: queues.yaml, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if .Values.models }}
- {name: models, mountPath: /app/models, readOnly: true}
{{- end }}
{{- end }}

{{- define "taxiway.fleetVolumes" -}}
- name: queues
  configMap: {name: {{ include "taxiway.name" . }}-queues}
- name: tmp
  emptyDir: {}
{{- with .Values.models }}
- name: models
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- end }}

{{/* A Deployment keeps the replicas that somebody else has set; a new one has `least`. */}}
{{- define "taxiway.replicas" -}}
{{- $live := lookup "apps/v1" "Deployment" .root.Release.Namespace .name -}}
{{- if and $live (hasKey $live.spec "replicas") }}{{ $live.spec.replicas }}{{ else }}{{ .least }}{{ end -}}
{{- end }}
