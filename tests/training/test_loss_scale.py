"""float16: the scale halves on an overflow and grows again; a skipped step changes nothing."""

import numpy as np
import pytest
from support.training import bits, run_steps

from mistral_ms.config import LossScaleConfig
from mistral_ms.training import NotFiniteError, Progress
from mistral_ms.training.loss_scale import LossScale

SCALING = LossScaleConfig(initial=1024.0, growth_interval=3, minimum=256.0)


class TestScale:
    def course(self, finite, config=SCALING):
        scale, values = LossScale.start(config), []
        for each in finite:
            scale = scale.after(config, each)
            values.append(scale.value)
        return values

    def test_doubles_after_so_many_good_steps_in_a_row(self):
        assert self.course([True] * 7) == [1024, 1024, 2048, 2048, 2048, 4096, 4096]

    def test_an_overflow_halves_it_and_starts_the_count_anew(self):
        assert self.course([True, True, False, True, True, True]) == [
            1024, 1024, 512, 512, 512, 1024,
        ]  # fmt: skip

    def test_not_below_the_minimum(self):
        assert self.course([False] * 4) == [512, 256, 256, 256]

    def test_without_scaling_it_stays_one(self):
        assert self.course([True, False, True], None) == [1, 1, 1]


def test_an_overflow_skips_the_update_and_nothing_else(make_update, data):
    """2^31 overflows float16's gradients; a few halvings later training goes on."""
    scaling = LossScaleConfig(initial=2.0**31, growth_interval=100)
    update = make_update(max_steps=40, dtype="float16", loss_scale=scaling)
    before = bits(update)
    first = run_steps(update, data, 1)[0]
    assert not first.finite
    assert bits(update) == before
    assert update.progress == Progress(step=1, updates=0, scale=LossScale(2.0**30))
    results = run_steps(update, data, 30)
    skipped = 1 + sum(not result.finite for result in results)
    assert 5 < skipped < 25
    assert update.progress.updates == 31 - skipped
    assert results[-1].finite
    assert bits(update) != before
    assert [r.loss_scale for r in results[:3]] == [2.0**30, 2.0**29, 2.0**28]


@pytest.mark.slow
def test_follows_float32(make_update, data):
    """Half precision forward and backward, float32 masters: the same course, more coarsely."""
    courses = [
        [result.lm_loss for result in run_steps(update, data, 15)]
        for update in (make_update(max_steps=15, dtype=dtype) for dtype in ("float32", "float16"))
    ]
    # A rounding to 11 bits is 5e-4; now and then it makes a token choose another expert, which
    # moves the loss of these 32 tokens by up to 1 % (measured)
    assert courses[1] == pytest.approx(courses[0], rel=2e-2)
    assert courses[0] != courses[1]


@pytest.mark.slow
def test_masters_take_steps_too_small_for_float16(make_update, data, training):
    """At a rate of 1e-6 the rounded weights hardly move; the masters do."""
    optimizer = training.optimizer.model_dump(exclude_unset=True) | {"learning_rate": 1e-6}
    update = make_update(max_steps=4, dtype="float16", optimizer=optimizer)
    name = "master.layers.0.attention.q_proj.weight"
    before = update.optimizer.state()[name].asnumpy().copy()
    run_steps(update, data, 3)
    after = update.optimizer.state()[name].asnumpy()
    weight = update.model.weights()[name.removeprefix("master.")].asnumpy()
    assert np.count_nonzero(after != before) > 0.9 * after.size
    assert np.array_equal(weight, after.astype(np.float16))
    assert np.count_nonzero(weight != before.astype(np.float16)) < 0.5 * weight.size


@pytest.mark.slow
def test_an_overflow_at_the_smallest_scale_is_an_error(make_update, data):
    scaling = LossScaleConfig(initial=2.0**31, minimum=2.0**30)
    update = make_update(dtype="float16", loss_scale=scaling)
    run_steps(update, data, 1)
    with pytest.raises(
        NotFiniteError, match=r"step 2: .*: even at the smallest loss scale, 1.07374e\+09"
    ):
        run_steps(update, data, 1)
    assert update.progress.step == 1
