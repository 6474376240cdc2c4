"""What the compiler would refuse without saying why is a ConfigError before it runs."""

import pytest
from support import configs

from mistral_ms.config import RunConfig
from mistral_ms.errors import ConfigError
from mistral_ms.parallel.graph.checks import check_run


def run(**changes):
    training = {"steps": 1, "seq_length": 16, "global_batch_size": 32, "micro_batches": 4}
    return RunConfig(
        model=configs.model(**changes.pop("model", {})),
        routing={"policy": "capacity", "aux_loss": "per_layer", **changes.pop("routing", {})},
        training={**training, **changes.pop("training", {})},
        parallel={"dp": 2, "ep": 2, "pp": 4, **changes.pop("parallel", {})},
    )


REFUSED = {
    "static shapes": {"routing": {"policy": "dropless"}},
    "layer by layer": {"routing": {"aux_loss": "pooled"}},
    "different stages": {"model": {"tie_word_embeddings": True}},
    "a pipeline of 4 stages needs": {"training": {"micro_batches": 2}},
    "pipeline is 1f1b": {"parallel": {"schedule": "gpipe"}},
    "norms and residuals divide them": {
        "parallel": {"mp": 2},
        "training": {"seq_length": 7, "global_batch_size": 8},
    },
    "takes its batch at once": {"parallel": {"dp": 1, "ep": 1, "pp": 1}},
}


def test_a_legal_run_passes():
    check_run(run(), 4)


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ConfigError, match=message):
        check_run(run(**REFUSED[message]), 4)


def test_each_stage_needs_a_layer():
    with pytest.raises(ConfigError, match="every one of the 4 pipeline stages holds a layer"):
        check_run(run(), 2)


@pytest.mark.parametrize(
    ("parallel", "rule"),
    [
        ({"mp": 4}, "must divide num_key_value_heads"),
        ({"dp": 16, "ep": 16}, "must divide num_local_experts"),
    ],
)
def test_layouts_that_do_not_divide_the_model_are_refused_by_the_configuration(parallel, rule):
    with pytest.raises(ConfigError, match=rule):
        run(parallel={"pp": 2, **parallel}, training={"global_batch_size": 64})
