"""The command on a small auto-parallel graph, and what it says when something goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_ms.errors import ConfigError, DryrunError, GraphError, MistralMsError
from mistral_ms.parallel.dryrun import standins
from mistral_ms.parallel.dryrun.process import Request

ROOT = Path(__file__).parents[2]
RUN = f"""
model: {ROOT}/configs/model/mixtral_tiny.yaml
training: {{max_steps: 1, seq_length: 32, global_batch_size: 32}}
parallel: {{dp: 32, ep: 8}}
"""
C, E, H = 4, 8, 16
EXPERT, COPIES = [16, 17, 18, 19, 20, 21, 22, 23], [3, 11, 19, 27]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(RUN)
    return path


def test_rank_19_of_32(environ, config, tmp_path):
    """Two all-to-alls each way in its expert group; its expert's gradient over the four copies."""
    out = tmp_path / "out.json"
    line = [sys.executable, ROOT / "run_mixtral.py", "dryrun", "--config", config, "--rank", "19"]
    line += ["--target", "dryrun.auto_target:build", "--json", out, "--logs", tmp_path / "logs"]
    line += ["--cost", "--picture", tmp_path / "cost.png"]
    done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(out.read_text())
    assert (found["rank"], found["stage"]) == (19, 0)
    lines = {
        (line["operator"], line["phase"], line["group"]): line for line in found["communication"]
    }
    for phase in ("forward", "backward"):
        line = lines["AlltoAll", phase, "expert"]
        assert (line["ranks"], line["count"]) == (EXPERT, 2)
        assert (line["bytes"], line["inter_node"]) == (E * C * H * 4, False)
    line = lines["AllReduce", "backward", "expert_data"]
    assert (line["ranks"], line["count"], line["bytes"]) == (COPIES, 1, H * H * 4)
    assert line["inter_node"]
    assert found["alltoall_per_moe_layer"] == {"forward": 2, "backward": 2}
    line = lines["AllReduce", "backward", "data"]
    assert (line["ranks"], line["count"], line["bytes"]) == (list(range(32)), 1, H * 4)
    weights = (H * H + H) * 4  # one of the eight experts, and the scale
    assert found["parameter_bytes"] == weights + 8  # MindSpore's step and learning rate
    assert found["optimizer_bytes"] == 2 * weights
    # a row for each of seven neighbours, four times; rings of four and of 32, rank 20 is near
    inside, ring = 4 * 7 * (C * H * 4), 2 * 31
    assert found["sent"]["bytes_inside"] == inside + ring * (H * 4 // 32 + -(-4 // 32))
    assert found["sent"]["bytes_between"] == 2 * 3 * (H * H * 4 // 4)
    assert "all-to-all per sparse layer and micro-batch: 2 forward, 2 backward" in done.stdout
    # the expert's product and its two gradients, of the slots that the eight of a group send
    products = {each["class"]: each for each in found["cost"]["operators"]}["matmul"]
    assert products["flops"] == 3 * 2 * (8 * C) * H * H
    assert "Predicted; never run on an NPU" in done.stdout
    assert (tmp_path / "cost.png").read_bytes()[1:4] == b"PNG"


def test_a_graph_that_does_not_compile_is_a_failed_check(command, config, tmp_path):
    target = "dryrun.auto_target:absent"
    done = command("--config", config, "--target", target, "--logs", tmp_path)
    assert done.exit_code == 1
    assert "failed: the graph does not compile: rank 0: AttributeError" in done.output
    assert str(tmp_path / "rank_0.log") in done.output


def test_an_impossible_rank_is_bad_input(command, config):
    done = command("--config", config, "--rank", "32")
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception) == "no such rank: --rank: 32: 0 to 31, or all"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--picture", "a.png"], "no picture: --picture: a.png: needs --cost, and one rank"),
        (["--cost", "--picture", "a.jpg"], "no picture: --picture: a.jpg: ends with .png or .svg"),
        (["--cost", "--hardware", "b"], "unknown hardware: --hardware: b: known: atlas_800t_a2, "),
    ],
)
def test_a_cost_that_cannot_be_shown_is_bad_input(command, config, more, message):
    done = command("--config", config, *more)
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith(message)


def test_a_prediction_has_no_cost(command):
    done = command("--config", ROOT / "configs/run/predict_mixtral_8x7b_8card.yaml", "--cost")
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith("no cost: --cost: a prediction file: ")


CAPACITY = ["routing.policy=capacity", "routing.aux_loss=per_layer"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["parallel.dp=16", "parallel.pp=2", "training.gradient_accumulation_steps=2",
             "training.global_batch_size=32"],
            "impossible objective: routing.aux_loss: pooled ",
        ),
        (
            [*CAPACITY, "parallel.dp=16", "parallel.pp=2"],
            "impossible graph: training.gradient_accumulation_steps: 1: "
            "a pipeline of 2 stages needs ",
        ),
        (
            [*CAPACITY, "parallel.dp=12", "parallel.ep=1", "parallel.pp=2",
             "training.gradient_accumulation_steps=2", "training.global_batch_size=24"],
            "no dry run: parallel: data group of ranks 0, 1, 2, ",
        ),
    ],
)  # fmt: skip
def test_what_no_rank_can_compile_is_bad_input_before_the_first(command, config, changes, message):
    done = command("--config", config, "--rank", "all", *changes)
    assert isinstance(done.exception, MistralMsError)
    assert str(done.exception).startswith(message)
    assert "rank 0" not in done.output


def refused(compiler, logs, target, limit=120.0):
    request = Request(0, 32, f"dryrun.broken_targets:{target}")
    with pytest.raises(GraphError) as caught, compiler.compiled(request, logs, limit):
        pass
    return str(caught.value)


def test_the_rule_and_the_place_are_named(compiler, tmp_path):
    message = refused(compiler, tmp_path, "mismatch")
    source = (ROOT / "tests/dryrun/broken_targets.py").read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(source) if "ops.matmul(x, x)" in text)
    assert f"tests/dryrun/broken_targets.py:{line}: RuntimeError on rank 0: " in message
    assert "For 'MatMulExt' op" in message
    assert message.endswith(f"see {tmp_path / 'rank_0.log'}")
    assert ".cc" not in message
    assert "\n" not in message


def test_a_death_and_a_delay(compiler, tmp_path):
    died = refused(compiler, tmp_path, "dies")
    assert died.startswith("the compiler died: rank 0: SIGABRT: MindSpore gave no message")
    slow = refused(compiler, tmp_path, "sleeps", 1)
    assert slow.startswith("too slow: compiling: 1 s: the time limit of a rank")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("platform.machine", lambda: "aarch64"), "Linux on x86_64, not aarch64"),
        (
            ("importlib.metadata.version", lambda _: "2.8.0"),
            "fit MindSpore 2.9.0 and 2.10.0, not 2.8.0",
        ),
        (("shutil.which", lambda _: None), "built with binutils and g\\+\\+ and gcc, not inst"),
    ],
)
def test_an_unfit_machine(monkeypatch, tmp_path, change, reason):
    if change[0] != "shutil.which":
        monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(*change)
    with pytest.raises(DryrunError, match=f"^no dry run: this machine: .*{reason}"):
        standins.standins(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_real_cann_comes_first(tmp_path):
    home = tmp_path / "cann"
    with pytest.raises(DryrunError, match=r"no CANN: ASCEND_HOME_PATH: .*: its lib64 is not there"):
        standins.find_runtime({"ASCEND_HOME_PATH": str(home)})
    (home / "lib64").mkdir(parents=True)
    runtime = standins.find_runtime({"ASCEND_HOME_PATH": str(home)})
    assert runtime.is_cann
    assert runtime.libraries[0] == home / "lib64"
