"""The graph of generation on one device gives the tokens and logits of the engine's own model."""

import numpy as np
import pytest
from dryrun.test_graph_numerics import weights_in_graph
from mindspore import Tensor
from support import configs

from mistral_ms.config import GenerationConfig, PredictConfig
from mistral_ms.inference import Engine
from mistral_ms.layers import CacheSpec
from mistral_ms.models import CausalLM
from mistral_ms.parallel import graph
from mistral_ms.training.modes import graph_mode

LENGTH, CHUNK, BATCH = 40, 4, 3
RAGGED = [[1, 5, 9, 20, 31, 8, 8, 17, 9, 14, 3], [1, 7], [1, 13, 14, 15, 16, 25, 21]]
CASES = {"sparse": {"moe": {}}, "dense": {}, "rolling window": {"moe": {}, "sliding_window": 7}}


def pair(case):
    """The engine's model and the graph's, with the same weights."""
    config = configs.model(num_hidden_layers=3, eos_token_id=None, **CASES[case])
    spec = CacheSpec.for_model(config, BATCH, LENGTH, CHUNK)
    ours = CausalLM(config, cache=spec, positions=LENGTH)
    ours.initialize(7)
    run = PredictConfig(
        model=config,
        prediction={"batch": BATCH, "max_length": LENGTH, "chunk": CHUNK, "dtype": "float32"},
    )
    theirs = graph.build_generation(run)
    parameters = theirs.weights()
    assert set(parameters) == set(ours.weights())
    for name, parameter in ours.weights().items():  # larger weights make routing less even
        parameter.set_data(parameter * (4.0 if parameter.ndim > 1 else 1.0))
        parameters[name].init_data()
        parameters[name].set_data(Tensor(weights_in_graph(name, parameter.asnumpy())))
    for parameter in theirs.get_parameters():
        parameter.init_data()
    return ours, theirs


@pytest.mark.parametrize("case", CASES)
def test_engine_generates_the_same(case):
    ours, theirs = pair(case)
    request = GenerationConfig(max_new_tokens=24)
    sizes = {"max_length": LENGTH, "chunk": CHUNK}
    expected = Engine(ours, **sizes).generate(RAGGED, request)
    with graph_mode():
        found = Engine(theirs, step=theirs, graph=False, **sizes).generate(RAGGED, request)
    for mine, wanted in zip(found.completions, expected.completions, strict=True):
        assert mine.token_ids == wanted.token_ids
        # float32 sums in another order
        np.testing.assert_allclose(mine.logprobs, wanted.logprobs, atol=1e-5)
