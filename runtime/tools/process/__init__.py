"""Runs a program and ends it with all its descendants, also if the runtime itself is killed."""
