"""Building blocks of the decoder, written as for one device."""

from mistral_ms.layers.attention import Attention, AttentionContext, visible_keys
from mistral_ms.layers.embedding import Embedding
from mistral_ms.layers.feed_forward import FeedForward
from mistral_ms.layers.kv_cache import CacheSpec, Columns, KeyPositions, KVCache, forget, zero
from mistral_ms.layers.linear import Linear, output_logits
from mistral_ms.layers.loss import HeadLoss, TokenNLL, token_nll
from mistral_ms.layers.norm import RMSNorm
from mistral_ms.layers.parameter import draw, is_buffer
from mistral_ms.layers.rope import RotaryTable, rope_angles
from mistral_ms.layers.rope_scaling import inverse_frequencies

__all__ = [
    "Attention",
    "AttentionContext",
    "CacheSpec",
    "Columns",
    "Embedding",
    "FeedForward",
    "HeadLoss",
    "KVCache",
    "KeyPositions",
    "Linear",
    "RMSNorm",
    "RotaryTable",
    "TokenNLL",
    "draw",
    "forget",
    "inverse_frequencies",
    "is_buffer",
    "output_logits",
    "rope_angles",
    "token_nll",
    "visible_keys",
    "zero",
]
