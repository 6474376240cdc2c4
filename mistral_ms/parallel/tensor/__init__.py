"""Dense layers divided among the ranks of a tensor group (Megatron-LM, arXiv:1909.08053).

A rank builds the ordinary layers with a smaller model's sizes (:func:`share_of_model`), and these
replace the ones at whose borders the ranks have to talk. The names of weights do not change; which
part of each a rank holds is :func:`mistral_ms.parallel.topology.weight_slice`.

===========================  =====================================  ============================
layer of the model           is replaced by                         talks
===========================  =====================================  ============================
norm before a shared layer   :class:`NormForShares`                 backward: one sum
attention.o_proj             :class:`RowLinear`                     forward: one sum
feed_forward.w2              :class:`RowLinear`                     forward: one sum
embed_tokens                 :class:`VocabularyEmbedding`           forward: one sum
norm before the head         :class:`NormForShares`                 backward: one sum
token_nll of whole logits    :class:`VocabularyNLL` of a share      forward: three small ones
===========================  =====================================  ============================

A sparse layer needs none of them: its dispatcher talks.
"""

from mistral_ms.parallel.tensor.embedding import VocabularyEmbedding
from mistral_ms.parallel.tensor.linear import ColumnLinear, RowLinear
from mistral_ms.parallel.tensor.loss import VocabularyNLL
from mistral_ms.parallel.tensor.norm import NormForShares
from mistral_ms.parallel.tensor.share import share_of_model

__all__ = [
    "ColumnLinear",
    "NormForShares",
    "RowLinear",
    "VocabularyEmbedding",
    "VocabularyNLL",
    "share_of_model",
]
