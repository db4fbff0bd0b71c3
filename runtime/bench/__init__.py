"""The benchmark: run a workload under several policies, measure it, and report it."""
