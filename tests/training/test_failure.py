"""The report on a loss that is not finite: which samples, which layer."""

import json

import numpy as np
import pytest
from mindspore import Tensor

from mistral_ms.config import ParallelConfig
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.training import NotFiniteError
from mistral_ms.training.failure import write_failure


@pytest.mark.slow
def test_names_the_samples_and_the_first_layer_that_broke(make_update, data, tmp_path):
    update = make_update(layers=2, gradient_accumulation_steps=2)
    weight = update.model.layers[1].attention.v_proj.weight
    values = weight.asnumpy().copy()
    values[0, 3] = np.inf
    weight.set_data(Tensor(values))
    batch = data.batch(0)
    with pytest.raises(NotFiniteError) as caught:
        update(batch)
    path = tmp_path / "failure.json"
    write_failure(path, update, caught.value, ParallelContext(ParallelConfig()))
    report = json.loads(path.read_text())
    assert report["step"] == 1
    assert report["samples"] == batch.samples_B.tolist()
    assert report["loss"] == "nan"
    layers = {layer["name"]: layer["not_finite"] for layer in report["layers"]}
    assert list(layers) == ["embedding", "layer 0", "layer 1"]
    assert layers["embedding"] == layers["layer 0"] == 0
    assert layers["layer 1"] > 0
    weights = {each["name"]: each for each in report["weights"]}
    assert set(weights) == set(update.model.weights())
    broken = [name for name, each in weights.items() if each["not_finite"]]
    assert broken == ["layers.1.attention.v_proj.weight"]
    assert all("gradient_norm" in each for each in weights.values())


def test_statistics_are_those_of_the_whole_batch(make_update, data):
    """The largest and the mean over all micro-batches; by hand for the embedding."""
    for micro_batches in (1, 4):
        update = make_update(layers=2, gradient_accumulation_steps=micro_batches)
        batch = data.batch(0)
        table = update.model.embed_tokens.weight.asnumpy()
        found = update.layer_statistics(batch)
        sizes = np.abs(table[batch.ids_BS])
        assert found[0]["largest"] == sizes.max()
        assert found[0]["mean"] == pytest.approx(sizes.mean(dtype=np.float64), rel=1e-12)
        assert [layer["not_finite"] for layer in found] == [0, 0, 0]
