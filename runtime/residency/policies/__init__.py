"""The built-in residency policies."""
