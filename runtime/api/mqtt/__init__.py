"""The service's MQTT API: jobs and commands in; results, events and states out. The broker stores nothing of record."""
