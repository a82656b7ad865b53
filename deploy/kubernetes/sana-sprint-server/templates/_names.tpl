{{- define "labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
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
