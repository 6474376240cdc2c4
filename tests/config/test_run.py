"""Rules between the sections of a run file."""

import json
from pathlib import Path

import pytest
from support import configs

from mistral_ms.config import RunConfig, load_run_config
from mistral_ms.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs" / "run"


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


@pytest.mark.parametrize(
    ("micro_batches", "parallel", "rule"),
    [
        (1, {"pp_interleave_num": 2}, r"pp_interleave_num \(2\) interleaves the chunks"),
        (2, {"pp": 2, "pp_interleave_num": 2, "pipeline_scheduler": "gpipe"}, "under .* 1f1b"),
        (1, {"pp": 2, "pp_interleave_num": 2}, r"\(1\) must be a multiple of parallel.pp \(2\)"),
        (2, {"pp": 2, "pp_interleave_num": 99}, r"\(99\) parts need as many layers"),
    ],
)
def test_what_cannot_be_interleaved(micro_batches, parallel, rule):
    with pytest.raises(ValueError, match=rule):
        run(8, micro_batches, **parallel)


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("parallel.tp=2", r"perhaps parallel\.mp; known keys: "),
        ("parallel.zero=1", r"perhaps parallel\.optimizer_parallel; "),
        ("training.lr=0.1", r"perhaps training\.optimizer\.learning_rate or .*lr_factor; "),
        ("training.bf16=true", r"perhaps training\.dtype; "),
        ("training.tp=2", r"perhaps parallel\.mp; "),
    ],
)
def test_keys_of_other_programs_lead_to_ours(override, advice):
    with pytest.raises(ConfigError, match=advice):
        load_run_config(CONFIGS / "pretrain_mixtral_tiny_200ep.yaml", [override])


def test_a_file_of_a_prediction_is_no_training():
    with pytest.raises(ConfigError, match=r"not a training: .*predict_mixtral_8x7b.*is for gener"):
        load_run_config(CONFIGS / "predict_mixtral_8x7b_8card.yaml")


@pytest.mark.parametrize("apart", [False, True], ids=["inline", "a file of its own"])
def test_counts_of_tokens_lie_beside_the_file_that_names_them(tmp_path, apart):
    gate = {"name": "hash_top_1", "table": "frequency", "token_counts": "counts/c.json"}
    moe = {"gate": gate, "num_experts_per_tok": 1, "norm_topk_prob": False}
    model = configs.model(moe=moe).model_dump(mode="json", exclude_none=True)
    training = {"max_steps": 1, "seq_length": 8, "global_batch_size": 1}
    values = {"model": "models/m.yaml" if apart else model, "training": training}
    where = tmp_path / "models" if apart else tmp_path
    if apart:
        where.mkdir()
        (where / "m.yaml").write_text(json.dumps(model))
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    found = load_run_config(tmp_path / "run.yaml").model.moe.gate
    assert found.token_counts == str(where / "counts" / "c.json")
