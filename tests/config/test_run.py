"""Rules between the sections of a run file."""

import pytest
from support import configs

from mistral_ms.config import RunConfig


def run(batch, micro_batches, **parallel):
    training = {
        "max_steps": 1, "seq_length": 8, "global_batch_size": batch,
        "gradient_accumulation_steps": micro_batches,
    }  # fmt: skip
    return RunConfig(model=configs.model(), training=training, parallel=parallel)


def test_ranks_micro_batches_and_copies_divide_the_batch():
    run(16, 2, dp=4, micro_batch_interleave_num=2)


@pytest.mark.parametrize(
    ("micro_batches", "parallel", "values"),
    [
        (4, {"dp": 4}, r"\(4 \* 4\)"),
        (2, {"dp": 4, "micro_batch_interleave_num": 2}, r"\(4 \* 2 \* 2\)"),
    ],
)
def test_a_batch_that_they_do_not_divide(micro_batches, parallel, values):
    with pytest.raises(ValueError, match=values + r" must divide training.global_batch_size \(8\)"):
        run(8, micro_batches, **parallel)
