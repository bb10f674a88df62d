"""The transformer, its configuration, its weights and its tokenizer."""
