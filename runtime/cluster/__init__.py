"""Devices of several machines: agents that run engines on other nodes, and the head that sends them requests."""
