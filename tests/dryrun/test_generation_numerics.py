"""The graph of generation on one device gives the tokens and logits of the engine's own model."""

import numpy as np
import pytest
from mindspore import Tensor
from support import configs
from support.hf import make_pair

from mistral_ms.config import GenerationConfig, ParallelConfig, PredictConfig
from mistral_ms.errors import ConfigError
from mistral_ms.inference import Engine, load_engine, load_graph_engine
from mistral_ms.layers import CacheSpec
from mistral_ms.models import CausalLM
from mistral_ms.ops.modes import graph_mode
from mistral_ms.parallel import graph
from mistral_ms.parallel.context import ParallelContext

LENGTH, CHUNK, BATCH = 40, 4, 3
RAGGED = [[1, 5, 9, 20, 31, 8, 8, 17, 9, 14, 3], [1, 7], [1, 13, 14, 15, 16, 25, 21]]
CASES = {
    "rolling window": {"moe": {}, "sliding_window": 7},
    # and positions beyond those of the model before scaling
    "dense, windows in some layers": {
        "moe": None,
        "sliding_window": 7,
        "layer_types": ["full_attention", "sliding_attention"],
        "max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
}
"""Sparse without a window is the model from Hugging Face below."""


def pair(case):
    """The engine's model and the graph's, with the same weights."""
    config = configs.model(num_hidden_layers=2, eos_token_id=None, **CASES[case])
    spec = CacheSpec.for_model(config, BATCH, LENGTH, CHUNK)
    ours = CausalLM(config, cache=spec, positions=LENGTH)
    ours.initialize(7)
    run = PredictConfig(
        model=config,
        prediction={"batch": BATCH, "max_length": LENGTH, "chunk": CHUNK, "dtype": "float32"},
    )
    theirs = graph.build_generation(run)
    parameters, storage = theirs.weights(), graph.generation_storage(run)
    assert set(parameters) == set(ours.weights())
    for name, parameter in ours.weights().items():  # larger weights make routing less even
        parameter.set_data(parameter * (4.0 if parameter.ndim > 1 else 1.0))
        parameters[name].init_data()
        values = storage.to_parameter(name, parameter.asnumpy())
        parameters[name].set_data(Tensor(np.ascontiguousarray(values)))
    for parameter in theirs.get_parameters():
        parameter.init_data()
    return ours, theirs


@pytest.mark.parametrize("case", CASES)
def test_engine_generates_the_same(case):
    ours, theirs = pair(case)
    request = GenerationConfig(max_new_tokens=24)
    sizes = {"max_length": LENGTH, "chunk": CHUNK}
    expected = Engine(ours, graph=False, **sizes).generate(RAGGED, request)
    with graph_mode():
        found = Engine(theirs, step=theirs, graph=False, **sizes).generate(RAGGED, request)
    for mine, wanted in zip(found.completions, expected.completions, strict=True):
        assert mine.token_ids == wanted.token_ids
        # float32 sums in another order
        np.testing.assert_allclose(mine.logprobs, wanted.logprobs, atol=1e-5)


def test_a_hugging_face_directory_is_loaded_into_the_graph(tmp_path):
    """Its tokens are those of the engine on the explicit path, which are Hugging Face's."""
    pair = make_pair("mixtral", eos_token_id=None)
    pair.hf.save_pretrained(tmp_path)
    sizes = {"batch": BATCH, "max_length": LENGTH, "chunk": CHUNK, "dtype": "float32"}
    run = PredictConfig(model=pair.config, prediction=sizes)
    for key, value in (("rope_theta", 9999.0), ("sliding_window", 8)):  # no shape tells them
        other = pair.config.model_copy(update={key: value})
        with pytest.raises(ConfigError, match=f"checkpoint of another model: model.{key}: "):
            load_graph_engine(tmp_path, run.model_copy(update={"model": other}))
    request = GenerationConfig(max_new_tokens=16)
    with graph_mode():  # which load_graph_engine would leave behind
        parallel_context = ParallelContext(ParallelConfig(execution="graph"))
        engine = load_engine(
            tmp_path, parallel_context=parallel_context, with_tokenizer=False, **sizes
        )
        found = engine.generate(RAGGED, request)
    plain = Engine.load(tmp_path, batch=BATCH, max_length=LENGTH, chunk=CHUNK, with_tokenizer=False)
    wanted = plain.generate(RAGGED, request)
    assert [c.token_ids for c in found.completions] == [c.token_ids for c in wanted.completions]
