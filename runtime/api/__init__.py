"""The service's doors: HTTP and MQTT over the same jobs and the same controller."""
