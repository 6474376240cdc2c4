"""Mistral 7B and Mixtral 8x7B on MindSpore, for Ascend NPUs and plain CPUs."""

__version__ = "0.1.0"
