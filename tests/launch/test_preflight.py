"""What the launcher refuses before it starts a process."""

import re
import sys

import numpy as np
import pytest
import yaml
from launch.jobs import finish, start
from support.ports import free_port

from mistral_ms.checkpoint import save_native
from mistral_ms.config import ModelConfig, MoEArchitecture, when_unknown
from mistral_ms.launch.checks import check_run, check_task
from mistral_ms.launch.options import Options
from mistral_ms.launch.tasks import ReadTask, TrainTask, option
from mistral_ms.shipped import import_shipped
from mistral_ms.weights import specs

MODEL = dict(
    vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, moe=dict(num_local_experts=4),
)  # fmt: skip
TRAINING = dict(max_steps=6, seq_length=8, global_batch_size=8)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    when_unknown(import_shipped)  # as the launcher does
    (tmp_path / "text.txt").write_text("a text")
    return tmp_path


def findings(root, arguments=(), node_rank=0, **changes):
    """Messages about a run file with these groups."""
    data = {"inputs": [str(root / "text.txt")], "tokenizer": "packaged-v1"}
    run = {"model": MODEL, "training": TRAINING, "data": data, **changes}
    (root / "run.yaml").write_text(yaml.safe_dump({k: v for k, v in run.items() if v}))
    task = TrainTask(root / "run.yaml", arguments)
    world = run.get("parallel", {}).get("pp", 1)
    options = Options(task, world, node_rank=node_rank)
    return [each.message for each in (*check_run(options), *check_task(options)) if each.fatal]


def test_a_run_that_can_begin_needs_no_mindspore(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "mistral_ms.training", None)  # importing it would fail
    assert findings(root) == []


def test_an_output_that_is_there(root):
    (root / "runs" / "run" / "checkpoints").mkdir(parents=True)
    (message,) = findings(root)
    assert "output exists: runs/run: checkpoints: a new run overwrites nothing" in message
    assert findings(root, node_rank=1) == [], "the first machine's processes write it"
    assert findings(root, ("--resume", "runs/run")) == []
    assert findings(root, ("--resume=runs/run", "output=runs/run")) == []


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (("--resume", "nowhere"), {}, "nothing to resume: nowhere: no such directory"),
        (("--resume", "here"), {"output": "there"}, "two directories: output: there"),
        ((), {"data": None}, r"nothing to learn: data: name data\.dataset, or data\.inputs"),
        (("data.inputs=[gone.txt]",), {}, r"gone\.txt"),
        (("data.inputs=[]", "data.dataset=gone"), {}, "gone"),
        (("init_from=gone",), {}, "gone"),
        ((), {"parallel": {"pp": 2}, "routing": {"policy": "dropless",
          "aux_loss": "pooled"}, "training": TRAINING | {"router_aux_loss_coef": 0.1,
          "gradient_accumulation_steps": 2}}, r"impossible objective: routing\.aux_loss: pooled"),
        (("training.dtype=bfloat16",), {}, r"dtype without kernels: training\.dtype: bfloat16"),
        (("training.optimizer.adam_beta1=2",), {}, r"training\.optimizer: adam_beta1: 2: "),
        (("training.optimizer.name=adamm",), {}, "unknown optimizer: .*perhaps adamw"),
        (("training.router_losses.load=0.1",), {}, "unknown router loss: .*load"),
        (("model.moe.gate=gshard_top_2", "model.moe.num_experts_per_tok=3"), {},
         "gshard_top_2 has a rule for the second"),
    ],
)  # fmt: skip
def test_what_the_processes_would_refuse(root, arguments, changes, message):
    (found,) = findings(root, arguments, **changes)
    assert re.search(message, found), found


def checkpoint(path, **changes):
    config = ModelConfig(**{**MODEL, **changes, "moe": MoEArchitecture(num_local_experts=4)})
    zeros = ((spec, np.zeros(spec.shape, np.float32)) for spec in specs(config))
    tensors = [(spec.name, spec.shape, "float32", values) for spec, values in zeros]
    save_native(path, config, tensors)
    return path


def test_a_checkpoint_of_another_model(root):
    checkpoint(root / "ckpt", hidden_size=16)
    (message,) = findings(root, ("init_from=ckpt",))
    assert "checkpoint of another model: model.hidden_size: 8: init_from ckpt has 16" in message
    checkpoint(root / "same")
    assert findings(root, ("init_from=same",)) == []
    (damaged,) = (root / "same").glob("*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-4])
    (message,) = findings(root, ("init_from=same",))
    assert damaged.name in message


def test_a_layout_that_does_not_divide_the_checkpoint(root):
    checkpoint(root / "ckpt")
    tasks = [
        ReadTask("generate", (8, 1, 1, 8), ("ckpt", "--prompt", "x")),
        ReadTask("align", (8, 1, 1, 8), ("ckpt", "ckpt")),
        ReadTask("generate", (1, 1, 1, 1), ("gone", "--prompt", "x")),
        ReadTask("generate", (1, 1, 1, 1), ("ckpt", "--from=hf")),
    ]
    good = ReadTask("generate", (4, 1, 2, 4), ("ckpt", "--from", "mistral_ms"))
    found = [[f.message for f in check_task(Options(task, 8))] for task in (*tasks, good)]
    assert [len(each) for each in found] == [1, 1, 1, 1, 0], found
    assert "ep (8) must divide num_local_experts (4)" in found[0][0] == found[1][0]
    assert "gone" in found[2][0]
    assert "hf" in found[3][0]


def test_options_among_arguments():
    arguments = ("ckpt", "--from", "hf", "--json=f", "--resume")
    assert [option(arguments, name) for name in ("--from", "--json", "--resume", "--x")] == [
        "hf", "f", None, None,
    ]  # fmt: skip


def test_no_process_is_started(root):
    """The launcher itself: bad input, and msrun has not run."""
    (root / "run.yaml").write_text(yaml.safe_dump({"model": MODEL, "training": TRAINING}))
    flags = ("--workers", "2", "--log-dir", "logs", "--port", str(free_port()))
    process = start(root, *flags, overrides=["parallel.dp=2"], stand_in=True)
    said = finish(process)
    assert (process.returncode, said) == (
        2, "error: nothing to learn: data: name data.dataset, or data.inputs\n"
    )  # fmt: skip
    assert not list((root / "logs").iterdir())
