"""What the machine says of itself: `nvml` asks the NVIDIA driver."""
