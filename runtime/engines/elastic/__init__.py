"""The part of Troupe that runs inside vLLM's engine process: a resizable KV cache, and a scheduler with live limits."""
