"""Readings of the devices that engines run on: GPUs through NVML, the host through psutil."""
