"""Text to token ids and back, streaming, chat templates."""
