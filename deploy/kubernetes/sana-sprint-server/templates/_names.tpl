{{- define "labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* The models as a list under `models`: name (empty for the one of `model`), source, claim, engine, out. */ -}}
{{- define "models" -}}
{{- $models := list }}
{{- if not .Values.models }}
{{- $one := dict "name" "" "source" .Values.model "claim" "" "engine" .Values.engine "out" "/engines/served" }}
{{- $models = append $models $one }}
{{- end }}
{{- $names := list }}
{{- range .Values.models }}
{{- if has .name $names }}{{ fail (printf "models: the name %s is there twice" .name) }}{{ end }}
{{- $names = append $names .name }}
{{- $claim := .claim | default "" }}
{{- $source := .source | default "" }}
{{- if $claim }}{{ $source = printf "/models/%s/%s" .name $source | trimSuffix "/" }}{{ end }}
{{- $engine := merge (dict) (.engine | default dict) $.Values.engine }}
{{- if and (hasKey (.engine | default dict) "build") (not .engine.build) }}{{ $_ := set $engine "build" false }}{{ end }}
{{- $out := printf "/engines/%s" .name }}
{{- $model := dict "name" .name "source" $source "claim" $claim "engine" $engine "out" $out }}
{{- $models = append $models $model }}
{{- end }}
{{- dict "models" $models | toYaml }}
{{- end }}

{{- define "environment" -}}
{{- if .Values.hub }}
- {name: HF_ENDPOINT, value: {{ .Values.hub | quote }}}
{{- end }}
{{- if .Values.hubTokenSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .Values.hubTokenSecret | quote }}, key: token}}
{{- end }}
{{- end }}

{{- define "limits" -}}
{{- toYaml .Values.resources.limits }}
{{- if .Values.gpu }}
{{ .Values.gpuResource }}: {{ .Values.gpu }}
{{- end }}
{{- end }}

{{- define "security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
