"""The same prompts through Hugging Face and here, layer by layer."""

from mistral_ms.alignment.align import align
from mistral_ms.alignment.compare import TOLERANCE, Comparison, Place, compare

__all__ = ["TOLERANCE", "Comparison", "Place", "align", "compare"]
