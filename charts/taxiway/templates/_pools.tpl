{{/* The values of one class; what it is called in names. */}}
{{- define "taxiway.className" -}}
{{ include "taxiway.name" .root }}-worker-{{ .class | replace "." "-" }}
{{- end }}

{{/* The classes of queues.yaml that pods serve: all but those whose engine `taxiway up` starts. */}}
{{- define "taxiway.hardware" -}}
{{- $served := dict -}}
{{- range $class, $hardware := .Values.hardware -}}
  {{- if or (not (dig "endpoint" "start" "llama" "" $hardware)) (dig $class "engine" false $.Values.classes) -}}
    {{- $_ := set $served $class $hardware -}}
  {{- end -}}
{{- end -}}
{{- toYaml $served -}}
{{- end }}

{{/* How a class is served: `external` (an endpoint elsewhere), `engine` (one in the pod), or `device`. */}}
{{- define "taxiway.kind" -}}
{{- if ne .hardware.device "endpoint" }}device{{ else if (.settings).engine }}engine{{ else }}external{{ end -}}
{{- end }}

{{/* The pools of a class, first choice first, as {pools: […]}: the class's own settings, then `pools`. */}}
{{- define "taxiway.pools" -}}
{{- $settings := .settings | default dict -}}
{{- $own := merge (dict "name" "first") (omit $settings "pools" "engine" "cache" "resources") -}}
{{- dict "pools" (concat (list $own) ($settings.pools | default list)) | toYaml -}}
{{- end }}

{{/* Where the pods of a pool go: nodeSelector, affinity, tolerations, and what they take of the node's devices. */}}
{{- define "taxiway.placement" -}}
{{- $all := .root.Files.Get "files/presets.yaml" | fromYaml -}}
{{- $cloud := .pool.cloud | default .root.Values.cloud -}}
{{- $preset := get $all $cloud | default dict -}}
{{- $node := .pool.node | default dict -}}
{{- $device := ternary "cuda" .hardware.device (eq .hardware.device "endpoint") -}}
{{- $selector := dict -}}{{- $tolerations := list -}}{{- $devices := dict -}}
{{- if and (has $device (list "cuda" "tpu")) (or (ne .hardware.device "endpoint") .pool.accelerator) -}}
  {{- $facts := get $preset $device -}}
  {{- if and .pool.accelerator $facts -}}
    {{- $_ := set $selector $facts.label .pool.accelerator -}}
    {{- $tolerations = $facts.tolerations -}}
    {{- $resource := $facts.resource -}}
    {{- if and .pool.mig $facts.mig -}}{{- $_ := set $selector $facts.mig .pool.mig -}}
    {{- else if .pool.mig -}}{{- $resource = printf "nvidia.com/mig-%s" .pool.mig -}}{{- end -}}
    {{- $count := 1 -}}
    {{- if $facts.topology -}}
      {{- $_ := set $selector $facts.topology (.pool.topology | default "1x1") -}}
      {{- range splitList "x" (.pool.topology | default "1x1") -}}{{- $count = mul $count (int .) -}}{{- end -}}
    {{- end -}}
    {{- $_ := set $devices $resource (toString $count) -}}
  {{- else if or (not $node.selector) (not $node.resources) -}}
    {{- fail (printf "classes.%s: a %s class needs `accelerator` with a `cloud` that has it, or `node` with a selector and resources (pool %s)" .class $device .pool.name) -}}
  {{- end -}}
{{- end -}}
{{- $affinity := dict -}}
{{- if eq (include "taxiway.capacity" .) "spot" -}}
  {{- if $preset.spot -}}
    {{- $_ := set $selector $preset.spot.label $preset.spot.value -}}
    {{- $tolerations = concat $tolerations $preset.spot.tolerations -}}
  {{- else if not $node.selector -}}
    {{- fail (printf "classes.%s: spot capacity needs a `cloud` with spot nodes, or `node` with a selector (pool %s)" .class .pool.name) -}}
  {{- end -}}
{{- else if $preset.spot -}}
  {{- $spot := dict "key" $preset.spot.label "operator" "NotIn" "values" (list $preset.spot.value) -}}
  {{- $terms := dict "nodeSelectorTerms" (list (dict "matchExpressions" (list $spot))) -}}
  {{- $affinity = dict "nodeAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" $terms) -}}
{{- end -}}
{{- range $name, $count := $node.resources -}}{{- $_ := set $devices $name (toString $count) -}}{{- end -}}
nodeSelector: {{ merge ($node.selector | default dict) $selector | toJson }}
affinity: {{ $affinity | toJson }}
tolerations: {{ concat $tolerations ($node.tolerations | default list) | toJson }}
devices: {{ $devices | toJson }}
{{- end }}

{{/* What a device on the pool's nodes costs an hour: the pool's own price, else the class's for its capacity; empty if 0. */}}
{{- define "taxiway.price" -}}
{{- $price := .hardware.price | default dict -}}
{{- $spot := ternary $price.spot_usd_per_hour nil (eq (include "taxiway.capacity" .) "spot") -}}
{{- with coalesce .pool.usd_per_hour $spot $price.usd_per_hour }}{{ . }}{{ end -}}
{{- end }}

{{- define "taxiway.capacity" -}}
{{ .pool.capacity | default .hardware.capacity | default "on-demand" }}
{{- end }}

{{/* Seconds from a pod's SIGTERM to its end: a drain, or on spot capacity what the class's notice and the cloud leave. */}}
{{- define "taxiway.grace" -}}
{{- $limits := .root.Values.limits | default dict -}}
{{- if eq (include "taxiway.capacity" .) "spot" -}}
  {{- $preset := get (.root.Files.Get "files/presets.yaml" | fromYaml) (.pool.cloud | default .root.Values.cloud) | default dict -}}
  {{- $most := $preset.grace | default 120 | int -}}
  {{- $notice := (.hardware.notice | default dict).grace | default 25 | ceil | int -}}
  {{- if gt $notice $most -}}
    {{- fail (printf "hardware.%s.notice.grace: %d s, but %s ends a spot pod after %d s" .class $notice (.pool.cloud | default .root.Values.cloud) $most) -}}
  {{- end -}}
  {{- min (max (add $notice 5) 15) $most -}}
{{- else -}}
  {{- add ($limits.grace | default 60 | ceil | int) 60 -}}
{{- end -}}
{{- end }}

{{/* What the values may not say: stops the chart with the place. */}}
{{- define "taxiway.check" -}}
{{- $names := dict -}}
{{- range $class, $hardware := include "taxiway.hardware" . | fromYaml -}}
  {{- $name := $class | replace "." "-" -}}
  {{- if hasKey $names $name -}}{{- fail (printf "hardware.%s: %s would have the same names in Kubernetes" $class (get $names $name)) -}}{{- end -}}
  {{- $_ := set $names $name $class -}}
  {{- if and (eq $hardware.device "endpoint") (not (dig $class "engine" false $.Values.classes)) -}}
    {{- range (kindIs "string" $hardware.endpoint.url | ternary (list $hardware.endpoint.url) $hardware.endpoint.url) -}}
      {{- if regexMatch "^https?://(localhost|127\\.[0-9.]+|\\[::1\\])([:/]|$)" . -}}
        {{- fail (printf "hardware.%s.endpoint.url: a pod cannot reach %s: name a server that it can reach, or give classes.%s an engine" $class . $class) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{/* Every API server has apiregistration.k8s.io, and helm knows of it from one alone: without a cluster nothing is asked. */}}
{{- $cluster := .Capabilities.APIVersions.Has "apiregistration.k8s.io/v1" -}}
{{- if and (eq .Values.autoscaler "keda") $cluster (not (.Capabilities.APIVersions.Has "keda.sh/v1alpha1")) -}}
  {{- fail "autoscaler: keda needs KEDA 2.17 or later in this cluster (https://keda.sh/docs/latest/deploy); install it first, or choose hpa, controller or none" -}}
{{- end -}}
{{- range $class, $settings := .Values.classes -}}
  {{- $hardware := get $.Values.hardware $class -}}
  {{- if not $hardware -}}{{- fail (printf "classes.%s: no such class in queues.yaml" $class) -}}{{- end -}}
  {{- if and $settings.pools (ne $.Values.autoscaler "controller") -}}
    {{- fail (printf "classes.%s.pools: only `autoscaler: controller` moves pods between pools" $class) -}}
  {{- end -}}
  {{- if $settings.engine -}}
    {{- if ne $hardware.device "endpoint" -}}{{- fail (printf "classes.%s.engine: the class is not a `device: endpoint`" $class) -}}{{- end -}}
    {{- $url := $hardware.endpoint.url -}}
    {{- if not (and (kindIs "string" $url) (regexMatch "^http://127\\.0\\.0\\.1:[1-9]" $url)) -}}
      {{- fail (printf "hardware.%s.endpoint.url: an engine in the pod is at http://127.0.0.1:PORT" $class) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end }}
