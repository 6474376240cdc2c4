"""Text from a model: sampling, the engine with its cache, chat."""
