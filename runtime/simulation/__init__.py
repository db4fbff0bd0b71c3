"""Simulations of policies without engines: the paper's model, and a request-level model in virtual time."""
