"""KV cache: block bookkeeping (no tensors) and the paged storage that it manages."""
