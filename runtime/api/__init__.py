"""The service API: HTTP and MQTT over the same job service, engines and controller."""
