"""Policies without engines: the paper's own model, and a request-level one on a virtual clock."""
