"""Building blocks of the decoder, written as for one device."""

from mistral_ms.layers.attention import (
    Attention,
    AttentionContext,
    AttentionCore,
    Packing,
    visible_keys,
)
from mistral_ms.layers.embedding import Embedding, embedded, embedding_noise
from mistral_ms.layers.feed_forward import FeedForward, GatedLinear
from mistral_ms.layers.kv_cache import CacheSpec, Columns, KeyPositions, KVCache
from mistral_ms.layers.linear import Linear, OutputLogits, output_logits
from mistral_ms.layers.loss import HeadLoss, TokenNLL, log_softmax, token_nll
from mistral_ms.layers.low_rank import (
    HandedAdapter,
    LowRank,
    LowRankGroupedLinear,
    LowRankLinear,
    LowRankQuantizedLinear,
    with_adapter,
)
from mistral_ms.layers.norm import PiecewiseNorm, RMSNorm
from mistral_ms.layers.parameter import is_buffer
from mistral_ms.layers.rope import RotaryTable, rope_angles
from mistral_ms.layers.rope_scaling import inverse_frequencies
from mistral_ms.layers.vocabulary_loss import VocabParallelCrossEntropy

__all__ = [
    "Attention",
    "AttentionContext",
    "AttentionCore",
    "CacheSpec",
    "Columns",
    "Embedding",
    "FeedForward",
    "GatedLinear",
    "HandedAdapter",
    "HeadLoss",
    "KVCache",
    "KeyPositions",
    "Linear",
    "LowRank",
    "LowRankGroupedLinear",
    "LowRankLinear",
    "LowRankQuantizedLinear",
    "OutputLogits",
    "Packing",
    "PiecewiseNorm",
    "RMSNorm",
    "RotaryTable",
    "TokenNLL",
    "VocabParallelCrossEntropy",
    "embedded",
    "embedding_noise",
    "inverse_frequencies",
    "is_buffer",
    "log_softmax",
    "output_logits",
    "rope_angles",
    "token_nll",
    "visible_keys",
    "with_adapter",
]
