"""Perplexity and accuracy: each sequence once, whatever the batch."""

import json
import math

import numpy as np
import pytest
import torch
from support.hf import make_pair
from support.links import link_files
from support.models import fill

from mistral_ms.checkpoint import save_native
from mistral_ms.config import DataConfig, ModelConfig, RoutingConfig
from mistral_ms.datasets import MindRecordSequences, build_dataset
from mistral_ms.errors import CheckpointError, DataError
from mistral_ms.models import CausalLM
from mistral_ms.tokenizer import packaged_tokenizer
from mistral_ms.training.evaluate import evaluate, load_for_evaluation


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "text.txt").write_text("A rope, a lamp, a ladder; the tide, the tower.\n" * 4)
    config = DataConfig(seq_length=12)
    build_dataset([root / "text.txt"], packaged_tokenizer(), config, root / "set")
    return MindRecordSequences(root / "set", 1, 0)


@pytest.fixture(scope="module")
def pair():
    return make_pair("mixtral", vocab_size=32000, num_hidden_layers=1)


def test_equals_torch_over_the_whole_dataset(pair, data):
    nll, right, tokens = 0.0, 0, 0
    for number in range(data.sequences):
        batch = data.read(np.array([number]))
        real = int(batch.present)
        with torch.no_grad():
            logits = pair.hf(torch.tensor(batch.ids_BS[:, :real]).long()).logits[0]
        labels = torch.tensor(batch.labels_BS[0, :real]).long()
        nll += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
        tokens += int((labels >= 0).sum())
    model = fill(CausalLM(pair.config), pair.weights())
    calls = []
    found = evaluate(model, data, 4, lambda done, total: calls.append((done, total)))
    assert data.sequences % 4, "the last batch must be short"
    assert found.tokens == tokens == data.info.counts.predicted
    assert found.loss == pytest.approx(nll / tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert found.accuracy == right / tokens
    assert calls[-1] == (data.sequences, data.sequences)
    one_by_one = evaluate(model, data, 1)
    assert one_by_one.loss == pytest.approx(found.loss, rel=1e-6)  # order of a sum
    assert one_by_one.accuracy == found.accuracy


def test_another_vocabulary_is_refused(data, tmp_path):
    config = ModelConfig(
        vocab_size=320, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, torch_dtype="float32",
    )  # fmt: skip
    weights = CausalLM(config).weights()
    arrays = ((n, w.shape, "float32", w.asnumpy()) for n, w in weights.items())
    save_native(tmp_path / "c", config, arrays)
    linked = link_files(tmp_path / "c", tmp_path / "linked")
    with pytest.raises(CheckpointError, match="file outside the checkpoint"):
        load_for_evaluation(linked, data)
    for path, options in ((tmp_path / "c", {}), (linked, {"follow_links": True})):
        with pytest.raises(DataError, match=r"tokenised with another vocabulary: .*32000 ids.*320"):
            load_for_evaluation(path, data, **options)


@pytest.mark.parametrize("factor", [None, 0.3])
def test_a_capacity_of_evaluation(pair, data, tmp_path, factor):
    """A checkpoint of a training with one is evaluated with it, in float32 and in its order."""
    routing = RoutingConfig(
        policy="capacity", capacity_factor=0.1, eval_capacity_factor=factor,
        drop_priority="choice_major",
    )  # fmt: skip
    arrays = ((n, w.shape, "float32", w) for n, w in pair.weights().items())
    state = json.dumps({"routing": routing.model_dump(mode="json")}).encode()
    save_native(tmp_path / "c", pair.config, arrays, extra_files={"state.json": state})
    loaded = load_for_evaluation(tmp_path / "c", data)
    want = routing.evaluation
    assert loaded.layers[0].moe.routing == loaded.layers[0].moe.experts.dispatcher.routing == want
    assert (want.policy, want.capacity_factor) == (
        ("capacity", 0.3) if factor else ("dropless", 1.1)
    )
