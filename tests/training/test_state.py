"""A checkpoint after 7 steps, 13 more in a fresh training: the bits of 20 steps in one go."""

import json
from dataclasses import replace

import mindspore as ms
import pytest
from support.training import as_reported, bits, run_steps

from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.config import LossScaleConfig, ParallelConfig
from mistral_ms.errors import CheckpointError, TrainingError
from mistral_ms.training.identity import Identity
from mistral_ms.training.state import restore, take_snapshot

pytestmark = pytest.mark.usefixtures("strict_graphs")

STEPS, FIRST = 20, 7
# overflows at first, and grows again before the end: the count of good steps matters, too
SCALE = LossScaleConfig(initial=2.0**26, growth_interval=3)
SCALED = {"dtype": "float16", "loss_scale": SCALE}
MODES = [
    pytest.param({}, {}, id="device"),
    pytest.param(
        SCALED,
        {**SCALED, "offload_optimizer": "host"},
        id="float16, scaled, from device to host",
        marks=pytest.mark.slow,
    ),
]


@pytest.fixture
def identity(sparse, capacity):
    def make(update, **changes):
        values = dict(
            model=sparse,
            routing=capacity,
            training=update.config,
            parallel=ParallelConfig(),
            dataset="digest",
        )
        return Identity(**values | changes)

    return make


@pytest.mark.parametrize(("before", "after"), MODES)
def test_resume_is_exact(make_update, data, identity, tmp_path, before, after):
    """On the host with micro-batches: tests/end_to_end/test_train.py, by the command."""
    whole = make_update(max_steps=STEPS, **before)
    want = run_steps(whole, data, FIRST)
    take_snapshot(whole, identity(whole)).write(tmp_path / "checkpoint", {})
    saved = replace(whole.progress)
    want += run_steps(whole, data, STEPS - FIRST)

    # nothing is what the run began with: everything must come from the checkpoint
    second = make_update(max_steps=STEPS, **after)
    for weight in second.held().values():
        ms.ops.assign(weight, ms.Tensor(weight.asnumpy() + 1))
    restore(second, tmp_path / "checkpoint")
    assert second.progress == saved
    results = want[:FIRST] + run_steps(second, data, STEPS - FIRST)

    assert [as_reported(r) for r in results] == [as_reported(r) for r in want]
    assert bits(second) == bits(whole)
    assert second.progress == whole.progress
    if "dtype" in before:
        skipped = STEPS - whole.progress.updates
        assert 2 < skipped < 15, "the scale must have moved for this to mean anything"
        assert whole.progress.scale.good or whole.progress.scale.value < SCALE.initial


class TestSnapshot:
    def test_nobody_changes_it_any_more(self, make_update, data, identity, tmp_path):
        """It is written in the background while the training goes on in the same buffers."""
        update = make_update()
        run_steps(update, data, 1)
        before = bits(update)
        snapshot = take_snapshot(update, identity(update))
        run_steps(update, data, 1)
        assert bits(update) != before
        held = {name: array.tobytes() for name, (array, _) in
                {**snapshot.weights, **snapshot.optimizer}.items()}  # fmt: skip
        assert held == before

    def test_is_a_checkpoint_like_any_other(self, make_update, identity, tmp_path):
        update = make_update(dtype="float16")
        take_snapshot(update, identity(update)).write(tmp_path / "checkpoint", {})
        with open_checkpoint(tmp_path / "checkpoint") as source:
            assert source.config.torch_dtype == "float16"
            assert {source.dtype(name) for name in source.names()} == {"float16"}
        state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
        assert (state["step"], state["updates"]) == (0, 0)
        assert state["loss_scale"] == {"value": 65536.0, "good": 0}


class TestRefused:
    @pytest.fixture
    def saved(self, make_update, identity, tmp_path):
        update = make_update()
        take_snapshot(update, identity(update)).write(tmp_path / "checkpoint", {})
        return tmp_path / "checkpoint"

    def test_another_optimizers_state(self, make_update, saved):
        with pytest.raises(CheckpointError, match=r"another optimizer's state: .*: master\."):
            restore(make_update(dtype="float16"), saved)

    def test_a_checkpoint_that_is_not_of_a_training(self, make_update, saved):
        (saved / "state.json").unlink()
        with pytest.raises(CheckpointError, match=r"state\.json"):
            restore(make_update(), saved)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                dict(model={"intermediate_size": 32}),
                r"another model: model\.intermediate_size: now 32, in C 24",
            ),
            (dict(training={"seed": 5}), r"another seed: training\.seed: now 5, in C 0"),
            (dict(training={"seq_length": 16}), r"another seq_length: .*now 16, in C 8"),
            (dict(training={"global_batch_size": 8}), r"another global_batch_size: .*8, in C 4"),
            (dict(training={"dtype": "float16"}), r"another dtype: .*'float16', in C 'float32'"),
            (dict(dataset="other"), r"another dataset: dataset: now 'other', in C 'digest'"),
        ],
    )
    def test_another_training(self, make_update, identity, change, message):
        update = make_update()
        state = identity(update).as_dict()
        changed = {
            key: getattr(identity(update), key).model_copy(update=value)
            if isinstance(value, dict)
            else value
            for key, value in change.items()
        }
        with pytest.raises(TrainingError, match=message):
            identity(update, **changed).compare(state, "C")

    def test_what_may_change_is_told(self, make_update, identity):
        update = make_update()
        state = identity(update).as_dict()
        assert identity(update).compare(state, "C") == []
        longer = update.config.model_copy(
            update={"max_steps": 60, "gradient_accumulation_steps": 2}
        )
        told = identity(update, training=longer).compare(state, "C")
        assert told == [
            "training.gradient_accumulation_steps: 1 before, 2 from here on",
            "training.max_steps: 6 before, 60 from here on",
        ]

    def test_who_divides_it_may_change(self, make_update, identity):
        update = make_update()
        ways = {way: ParallelConfig(execution=way) for way in ("auto", "explicit", "graph")}
        state = identity(update, parallel=ways["explicit"]).as_dict()
        assert identity(update, parallel=ways["graph"]).compare(state, "C") == [
            "parallel.execution: 'explicit' before, 'graph' from here on"
        ]
        unknown = identity(update, parallel=ways["auto"]).as_dict()
        assert identity(update, parallel=ways["graph"]).compare(unknown, "C") == []

    def test_how_files_hold_the_weights_is_no_other_model(self, make_update, identity, sparse):
        update = make_update()
        stored = sparse.model_copy(update={"torch_dtype": "float16"})
        assert identity(update, model=stored).compare(identity(update).as_dict(), "C") == []
