"""The same prompts through Hugging Face and here, layer by layer."""
