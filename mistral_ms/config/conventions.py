"""Numbers with a meaning that several packages share."""

from __future__ import annotations

IGNORE_INDEX = -100
"""Label of a token after which nothing is predicted (Hugging Face's convention)."""

PACKAGED_TOKENIZER = "packaged-"
"""``packaged-v1`` names a tokenizer that is installed with mistral_ms, in place of a path."""
