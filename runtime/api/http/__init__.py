"""The HTTP API: OpenAI-compatible endpoints, jobs, events, control, metrics and the live page."""
