"""Decides how much GPU memory and concurrency each engine gets: takes snapshots, asks a policy, applies its grants."""
