{{/* What belongs to a release, and what its pods are found by. */}}
{{- define "bake.selector" -}}
app.kubernetes.io/name: trtllm-bake
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "bake.labels" -}}
{{ include "bake.selector" . }}
app.kubernetes.io/part-of: trtllm-bake
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Releases of one group share one Service: a release and its canary. */}}
{{- define "bake.group" -}}
trtllm-bake/group: {{ .Values.group | default .Release.Name }}
{{- end }}

{{/* What values.schema.json cannot say. The message is what the user reads. */}}
{{- define "bake.check" -}}
{{- if not .Values.image.digest }}
{{- fail "image.digest is empty. Write the values of a baked image:  make chart MODEL=..." }}
{{- end }}
{{- if gt (int .Values.gpu.count) (int .Values.gpu.perHost) }}
{{- fail (printf "%s needs %d GPUs and a host has %d (gpu.perHost). All ranks of an engine run in one pod, and a pod runs on one host. docs/operations.md, 'A model that one host cannot hold', has a LeaderWorkerSet for NVIDIA's multi-node recipe. Fewer ranks:  make plan TP=%d" .Values.model (int .Values.gpu.count) (int .Values.gpu.perHost) (int .Values.gpu.perHost)) }}
{{- end }}
{{- if and .Values.gpu.count (ne (int .Values.gpu.count) (int .Values.worldSize)) }}
{{- fail (printf "gpu.count is %d and worldSize is %d; each rank has a GPU" (int .Values.gpu.count) (int .Values.worldSize)) }}
{{- end }}
{{- if and (ne .Values.autoscaling.kind "none") (gt (int .Values.autoscaling.min) (int .Values.autoscaling.max)) }}
{{- fail (printf "autoscaling.min is %d and autoscaling.max is %d" (int .Values.autoscaling.min) (int .Values.autoscaling.max)) }}
{{- end }}
{{- if and (eq .Values.autoscaling.kind "keda") (not .Values.autoscaling.prometheus) }}
{{- fail "autoscaling.kind is keda and autoscaling.prometheus is empty: KEDA has to know where Prometheus answers" }}
{{- end }}
{{- if and (not .Values.rollout.maxSurge) (not .Values.rollout.maxUnavailable) }}
{{- fail "rollout.maxSurge and rollout.maxUnavailable are both 0: no pod could ever be replaced" }}
{{- end }}
{{- if and (not .Values.service.enabled) (not .Values.group) }}
{{- fail "service.enabled is false and group is empty: nothing would reach the pods. group names the release whose Service they share" }}
{{- end }}
{{- if eq (toString .Values.env.METRICS) "off" }}
{{- if or .Values.serviceMonitor.enabled (ne .Values.autoscaling.kind "none") .Values.alerts.enabled }}
{{- fail "env.METRICS is off, and serviceMonitor, alerts or autoscaling live on /metrics" }}
{{- end }}
{{- end }}
{{- if and .Values.traces.headersSecret (not .Values.traces.endpoint) }}
{{- fail "traces.headersSecret is named and traces.endpoint is empty: the headers would go nowhere" }}
{{- end }}
{{- if and .Values.traces.endpoint .Values.networkPolicy.enabled (not .Values.networkPolicy.egress) }}
{{- fail (printf "traces.endpoint is %s and networkPolicy.egress lets nothing out. Name the collector and the cluster's DNS there; docs/operations.md, 'Traces', has the rules" .Values.traces.endpoint) }}
{{- end }}
{{- if and .Values.serviceMonitor.enabled (not .Values.service.enabled) }}
{{- fail "serviceMonitor.enabled needs service.enabled. The ServiceMonitor of the group's Service scrapes these pods too" }}
{{- end }}
{{- end }}

{{/* How fast pods come and go, for both autoscalers. Loading takes minutes, so a pod that was just started is not taken away. */}}
{{- define "bake.behavior" -}}
scaleUp:
  stabilizationWindowSeconds: 30
  policies: [{type: Pods, value: 2, periodSeconds: 60}]
scaleDown:
  stabilizationWindowSeconds: {{ .Values.autoscaling.scaleDownSeconds }}
  policies: [{type: Pods, value: 1, periodSeconds: 120}]
{{- end }}
