"""What runs inside vLLM's process: a KV cache over reserved address space, and a scheduler with live limits."""
