{{- define "flatwire.labels" -}}
app.kubernetes.io/name: {{ .Values.fullnameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
k8s-app: {{ .Values.fullnameOverride }}
{{- end }}

{{- define "flatwire.serviceAccount" -}}
{{ .Values.serviceAccount.name | default .Values.fullnameOverride }}
{{- end }}

{{- define "flatwire.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* What the pods of the daemon and those that take it away have in common. */}}
{{- define "flatwire.pod" -}}
hostNetwork: true
dnsPolicy: Default
serviceAccountName: {{ include "flatwire.serviceAccount" . }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
securityContext:
  # Files of the node are root's. What root may do is cut down below.
  runAsUser: 0
  runAsGroup: 0
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Every folder of the node is mounted where it lies there, so that a path means the same inside and outside. */}}
{{- define "flatwire.volumes" -}}
- name: cni-bin
  hostPath:
    path: {{ .Values.host.cniBinDir }}
    type: DirectoryOrCreate
- name: cni-conf
  hostPath:
    path: {{ .Values.host.cniConfDir }}
    type: DirectoryOrCreate
- name: state
  hostPath:
    path: {{ .Values.host.stateDir }}
    type: DirectoryOrCreate
{{- end }}

{{- define "flatwire.noRights" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
privileged: false
capabilities:
  drop: [ALL]
{{- end }}

{{- define "flatwire.probe" -}}
httpGet:
  path: {{ .probe.path }}
  port: {{ .port }}
  host: 127.0.0.1
initialDelaySeconds: {{ .probe.initialDelaySeconds }}
periodSeconds: {{ .probe.periodSeconds }}
timeoutSeconds: {{ .probe.timeoutSeconds }}
failureThreshold: {{ .probe.failureThreshold }}
{{- end }}
