"""Sums of an evaluation against torch on Hugging Face's logits."""

import numpy as np
import pytest
import torch
from mindspore import Tensor
from support.hf import hf_logits, make_pair
from support.models import fill, next_labels, ragged_batch

from mistral_ms.models import CausalLM, Scores


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_equal_torch(chunk):
    check(chunk)


def test_equal_torch_compiled(graph):
    """With chunks, the last of which is not full."""
    check(7)


def check(chunk):
    pair = make_pair("mixtral")
    model = fill(CausalLM(pair.config), pair.weights())
    ids, position_ids = ragged_batch([9, 4, 1], 320)
    labels = next_labels(ids, position_ids)
    segments = np.minimum(position_ids, 0)
    # make some guesses right: the labels of the first row are the model's own
    guesses = hf_logits(pair, ids, position_ids).argmax(-1)
    labels[0, :5] = guesses[0, :5]
    arrays = map(Tensor, (ids, labels, position_ids, segments))
    nll, right, counted = (float(x.asnumpy()) for x in Scores(model, chunk)(*arrays))
    logits = torch.tensor(hf_logits(pair, ids, position_ids)).reshape(-1, 320)
    flat = torch.tensor(labels).long().ravel()
    want = torch.nn.functional.cross_entropy(logits, flat, reduction="sum").item()
    assert nll == pytest.approx(want, rel=1e-5)  # float32 logits that differ by 2e-6
    assert counted == (labels != -100).sum()
    assert right == ((guesses == labels) & (labels != -100)).sum() >= 5
