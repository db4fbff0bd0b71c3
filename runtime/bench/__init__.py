"""Policies side by side: workloads, runs, figures, reports."""
