"""Who gets how much: observe, decide, apply, publish."""
