"""Checkpoints of Hugging Face, Mistral and ours: read, write, convert, inspect."""
