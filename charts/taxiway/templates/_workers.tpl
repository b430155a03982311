{{/* A Deployment of workers: root, class, hardware, settings, pool, name, device, least (replicas), kind. */}}
{{- define "taxiway.workers" -}}
{{- $placement := include "taxiway.placement" . | fromYaml }}
{{- $spot := eq (include "taxiway.capacity" .) "spot" }}
{{- $ofDevices := ne (include "taxiway.kind" .) "external" }}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ .name }}
  labels: {{- include "taxiway.labels" (dict "root" .root "component" "worker") | nindent 4 }}
    taxiway/class: {{ .class }}
spec:
  replicas: {{ include "taxiway.replicas" . }}
  minReadySeconds: 5
  progressDeadlineSeconds: {{ add .root.Values.startup 600 }}
  {{- if or $placement.devices (not $ofDevices) }}
  strategy: {type: RollingUpdate, rollingUpdate: {maxSurge: 0, maxUnavailable: 25%}} # a device is free only once its pod is gone
  {{- else }}
  strategy: {type: RollingUpdate, rollingUpdate: {maxSurge: 1, maxUnavailable: 0}}
  {{- end }}
  selector:
    matchLabels: {{- include "taxiway.workerLabels" . | nindent 6 }}
  template:
    metadata:
      labels: {{- include "taxiway.workerLabels" . | nindent 8 }}
      annotations: {checksum/queues: {{ include "taxiway.queues" .root | sha256sum }}}
    spec:
      {{- include "taxiway.pod" (dict "root" .root "priority" (ternary "spot" "worker" $spot)) | nindent 6 }}
      terminationGracePeriodSeconds: {{ include "taxiway.grace" . }}
      nodeSelector: {{ $placement.nodeSelector | toJson }}
      {{- with $placement.affinity }}
      affinity: {{ . | toJson }}
      {{- end }}
      tolerations: {{ $placement.tolerations | toJson }}
      {{- $engine := eq (include "taxiway.kind" .) "engine" }}
      {{- if $engine }}
      initContainers: # a sidecar: it has loaded before the worker starts, and outlives the worker's drain
        {{- include "taxiway.engine" (merge (dict "devices" $placement.devices) .) | nindent 8 }}
      {{- end }}
      containers:
        {{- include "taxiway.worker" (merge (dict "devices" (ternary dict $placement.devices $engine) "spot" $spot) .) | nindent 8 }}
      volumes:
        {{- include "taxiway.fleetVolumes" .root | nindent 8 }}
        - name: cache
          {{- $claim := (.settings).cache | default .root.Values.cache.claim }}
          {{- if $claim }}
          persistentVolumeClaim: {claimName: {{ $claim }}}
          {{- else }}
          emptyDir: {sizeLimit: {{ .root.Values.cache.size }}}
          {{- end }}
        {{- with ((.settings).engine).weights }}
        - name: weights
          {{- if .image }}
          image: {reference: {{ .image }}, pullPolicy: IfNotPresent}
          {{- else }}
          persistentVolumeClaim: {claimName: {{ .claim }}, readOnly: true}
          {{- end }}
        {{- end }}
{{- end }}

{{- define "taxiway.workerLabels" -}}
{{ include "taxiway.selector" (dict "root" .root "component" "worker") }}
taxiway/class: {{ .class }}
taxiway/pool: {{ .pool.name | quote }}
{{- end }}

{{- define "taxiway.worker" -}}
{{- $external := eq (include "taxiway.kind" .) "external" }}
{{- $image := ternary "cpu" .hardware.device (eq .hardware.device "endpoint") }}
- name: worker
  image: {{ include "taxiway.image" (dict "root" .root "image" (printf "worker-%s" $image)) }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  args: [--class, {{ .class | quote }}, --device, {{ .device | quote }}]
  {{- include "taxiway.confined" . | nindent 2 }}
  env:
    {{- include "taxiway.brokerEnv" .root | nindent 4 }}
    {{- include "taxiway.sealEnv" .root | nindent 4 }}
    {{- if not $external }}
    {{- with include "taxiway.price" . }}
    - {name: TAXIWAY_USD_PER_HOUR, value: {{ . | quote }}}
    {{- end }}
    {{- end }}
    {{- with (.hardware.endpoint).key_env }}
    - name: {{ . }}
      valueFrom: {secretKeyRef: {name: {{ include "taxiway.className" $ }}, key: key}}
    {{- end }}
  {{- if .spot }}
  lifecycle: # the notice's seconds, not those of an ordinary drain
    preStop: {exec: {command: [sh, -c, "kill -USR2 1"]}}
  {{- end }}
  startupProbe: {exec: {command: [sh, docker/check_worker.sh]}, periodSeconds: 5, timeoutSeconds: 3, failureThreshold: {{ div (add .root.Values.startup 4) 5 }}}
  readinessProbe: {exec: {command: [sh, docker/check_worker.sh]}, periodSeconds: 5, timeoutSeconds: 3, failureThreshold: 2}
  livenessProbe: {exec: {command: [sh, docker/check_worker.sh, "900"]}, periodSeconds: 60, timeoutSeconds: 10}
  resources: {{- include "taxiway.workerResources" . | nindent 4 }}
  volumeMounts:
    {{- include "taxiway.fleetMounts" .root | nindent 4 }}
    - {name: cache, mountPath: /cache}
{{- end }}

{{/* Requests and limits of a worker: the class's own, or by its kind of device, with the devices of its pool. */}}
{{- define "taxiway.workerResources" -}}
{{- $small := eq .hardware.device "endpoint" }}
{{- $memory := ternary "1Gi" (ternary "4Gi" "16Gi" (eq .hardware.device "cpu")) $small }}
{{- $space := ternary "1Gi" .root.Values.cache.size (or $small (not (empty (or (.settings).cache .root.Values.cache.claim)))) }}
{{- $default := dict "requests" (dict "cpu" (ternary "250m" "1" $small) "memory" $memory "ephemeral-storage" $space) "limits" (dict "memory" $memory) }}
{{- $own := ternary dict ((.settings).resources | default dict) (and $small (not (empty (.settings).engine))) }}
{{- $all := merge (deepCopy $own) $default }}
{{- range $name, $count := .devices }}
{{- $_ := set $all.requests $name $count }}{{ $_ := set $all.limits $name $count }}
{{- end }}
{{- toYaml $all }}
{{- end }}

{{/* The engine's own container, which has the pod's devices. */}}
{{- define "taxiway.engine" -}}
{{- $engine := .settings.engine }}
{{- $preset := get (.root.Files.Get "files/engines.yaml" | fromYaml) ($engine.preset | default "") | default dict }}
{{- $port := $engine.port | default $preset.port | int }}
{{- if or (not $port) (not (or $engine.image $preset.image)) }}
{{- fail (printf "classes.%s.engine: needs a preset (vllm, llama.cpp, triton), or image, port and load" .class) }}
{{- end }}
- name: engine
  restartPolicy: Always
  image: {{ $engine.image | default $preset.image }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  {{- with $engine.command | default $preset.command }}
  command: {{ . | toJson }}
  {{- end }}
  args: {{ concat ($preset.args | default list) ($engine.args | default list) | toJson }}
  securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
  env:
    - {name: HOME, value: /cache}
    {{- range $name, $value := $engine.env }}
    - {name: {{ $name }}, value: {{ $value | quote }}}
    {{- end }}
  ports:
    - {name: engine, containerPort: {{ $port }}, protocol: TCP}
  {{- $load := $engine.load | default $preset.load }}
  startupProbe: {httpGet: {path: {{ $load }}, port: engine}, periodSeconds: 5, timeoutSeconds: 3, failureThreshold: {{ div (add .root.Values.startup 4) 5 }}}
  readinessProbe: {httpGet: {path: {{ $load }}, port: engine}, periodSeconds: 5, timeoutSeconds: 5}
  livenessProbe: {httpGet: {path: {{ $load }}, port: engine}, periodSeconds: 30, timeoutSeconds: 30, failureThreshold: 4}
  {{- $default := dict "requests" (dict "cpu" "2" "memory" "16Gi" "ephemeral-storage" .root.Values.cache.size) "limits" (dict "memory" "32Gi") }}
  {{- $all := merge (deepCopy (.settings.resources | default dict)) $default }}
  {{- range $name, $count := .devices }}
  {{- $_ := set $all.requests $name $count }}{{ $_ := set $all.limits $name $count }}
  {{- end }}
  resources: {{- toYaml $all | nindent 4 }}
  volumeMounts:
    - {name: cache, mountPath: /cache}
    - {name: tmp, mountPath: /tmp}
    {{- if $engine.weights }}
    - {name: weights, mountPath: /weights, readOnly: true}
    {{- end }}
{{- end }}
