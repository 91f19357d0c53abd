"""What works inside vLLM. Nothing else of ours imports it."""
