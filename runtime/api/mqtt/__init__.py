"""MQTT: jobs in and out, states, and commands, over a broker that is never the store."""
