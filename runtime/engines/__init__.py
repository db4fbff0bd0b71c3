"""vLLM engines whose memory and concurrency change while they run. Start with README.md, then `handle`."""
