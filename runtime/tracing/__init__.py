"""OpenTelemetry traces of jobs. Without `traces` in the configuration, nothing of OpenTelemetry is imported."""
