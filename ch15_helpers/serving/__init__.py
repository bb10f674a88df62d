"""Serving: requests, the iteration-level scheduler, the model runner and the engine."""
