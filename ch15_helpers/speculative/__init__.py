"""Speculative decoding: cheap guesses at the next tokens, verified together in one step."""
