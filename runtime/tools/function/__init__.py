"""Runs Python functions as tools, each call in a worker process."""
