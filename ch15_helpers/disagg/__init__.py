"""Disaggregated serving: KV blocks that travel between pools, and what may go wrong on the way."""
