"""The decoder and the causal language model on top of it."""
