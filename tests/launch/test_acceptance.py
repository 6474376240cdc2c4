"""The acceptance script: what it would run, what it refuses, and that it notices what is wrong."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mistral_ms.config import load_run_config
from mistral_ms.training import StepRecord

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
TINY = str(ROOT / "configs" / "run" / "pretrain_mixtral_tiny_200ep.yaml")
FULL = ["--hf", "/hf", "--data", "/data", "--master", "10.0.0.1", "--output", "/out"]
STEPS = 20


@pytest.fixture
def script(monkeypatch):
    """The module, and beside it the steps."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("acceptance", SCRIPTS / "acceptance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def steps(script):
    return sys.modules["acceptance_steps"]


def printed(script, capsys, *arguments):
    """The commands by name of what they write, without the programs' paths."""
    assert script.main([*arguments, "--print"]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("#")]
    return [[word.removeprefix(f"{ROOT}/") for word in shlex.split(line)] for line in lines]


def test_what_is_run_on_npus(script, capsys):
    # the environment may be in the repository
    python, tiny = (path.removeprefix(f"{ROOT}/") for path in (sys.executable, TINY))
    explicit = "parallel.execution=explicit"
    short = ["training.max_steps=20", "training.warmup_steps=5", explicit]

    def alone(name, *more):
        command = [python, "run_mixtral.py", "train", "--config", tiny]
        return [*command, f"output=/out/{name}", *short, *more]

    def together(name, *more):
        flags = ["--workers", "8", "--port", "8118", "--log-dir", f"/out/{name}-ranks", "--"]
        command = ["scripts/msrun_train.sh", "--config", tiny, *flags]
        return [*command, f"output=/out/{name}", *short, *more]

    groups, layout = "training.gradient_accumulation_steps=8", ["parallel.dp=8", "parallel.ep=8"]
    hops = ["parallel.devices_per_node=4", "parallel.all_to_all=hierarchical"]
    half = "training.dtype=bfloat16"
    assert printed(script, capsys, *FULL) == [
        [python, "run_mixtral.py", "convert", "/hf", "/out/converted"],
        [python, "run_mixtral.py", "align", "/hf", "/out/converted", "--json", "/out/align.json"],
        alone("one", groups),
        together("flat", *layout),
        together("hierarchical", *layout, *hops),
        alone("host", groups, "training.offload_optimizer=host"),
        together("explicit", *layout, half),
        together("graph", *layout, half, "parallel.execution=graph"),
        [
            "scripts/pretrain_mixtral_8x7b_4node_32card.sh", "--node-rank", "0",
            "--master", "10.0.0.1", "--port", "8118", "--log-dir", "/out/cards32-ranks", "--",
            "training.max_steps=20", "output=/out/cards32", explicit,
            "training.warmup_steps=20", "training.optimizer.learning_rate=3.0e-6",
            "data.dataset=/data",
        ],
    ]  # fmt: skip


def test_the_32_cards_have_the_rates_of_the_runs_first_steps(steps):
    from mistral_ms.training import learning_rate

    config = ROOT / "configs" / "run" / "pretrain_mixtral_8x7b_32card.yaml"
    whole = load_run_config(config).training
    short = load_run_config(config, ["training.max_steps=20", *steps.RATES_32]).training
    for step in range(STEPS):
        assert learning_rate(short, step) == pytest.approx(learning_rate(whole, step), rel=1e-12)


@pytest.mark.parametrize(
    "flags",
    [
        ["--small", "--workers", "2"],
        ["--small", "--workers", "4"],
        [*FULL, "--only", "experts", "--only", "hierarchical", "--only", "cards32"],
    ],
    ids=["small-2", "small-4", "full"],
)
def test_every_training_is_one_that_train_and_the_launcher_accept(script, steps, flags):
    """As far as run file, layout and number of processes go."""
    options, names, _ = script.parse(flags)
    runs = {r.name: r for s in steps.chosen(steps.make_steps(options), names) for r in s.runs}
    for line in (list(run.line) for run in runs.values()):
        if line[0].endswith(".sh"):
            line.insert(line.index("--"), "--print")
            done = subprocess.run(
                line, env={**os.environ, "PYTHON": sys.executable},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, "")
        elif "train" in line:
            run = load_run_config(Path(TINY), line[line.index(TINY) + 1 :])
            assert run.parallel.world == 1


def test_machines_beside_the_first_take_part_in_the_32_cards_only(script, capsys):
    rest = ["--data", "/data", "--master", "a", "--node-rank", "2", "--output", "/out"]
    (line,) = printed(script, capsys, *rest, "--only", "cards32")
    assert line[1:3] == ["--node-rank", "2"]
    with pytest.raises(SystemExit):
        script.parse([*FULL, "--node-rank", "2"])
    assert "the other steps are of machine 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "step align needs --hf: give it, or choose others (--only)"),
        (["--hf", "x"], "step cards32 needs --data"),
        (["--hf", "x", "--data", "y"], "step cards32 needs --master"),
        ([*FULL, "--workers", "4"], "step cards32 has 8 cards on each machine"),
        (["--only", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_what_is_missing_is_named(script, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        script.main(flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


GOOD = StepRecord(
    step=1, epoch=0.1, loss=10.4, lm_loss=10.4, aux_loss=2.0, z_loss=0.0, lr=1e-3, grad_norm=1.0,
    tokens_per_s=100.0, loss_scale=1.0, skipped=0, dropped_fraction=0.1,
    expert_load=((0.5, 0.4, 0.1), (0.3, 0.3, 0.4)),
)  # fmt: skip


def falling(number):
    return replace(GOOD, step=number + 1, lm_loss=10.4 - 0.1 * number, loss=10.5 - 0.1 * number)


def written(directory, change=lambda records: records, **memory):
    """A finished run's files; its losses fall."""
    directory.mkdir()
    records = change([falling(number) for number in range(STEPS)])
    lines = (json.dumps(asdict(record)) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text("".join(lines).replace("NaN", "null"))
    memory = {"device_optimizer": 0, "host_optimizer": 800, **memory}
    (directory / "summary.json").write_text(json.dumps({"memory": memory}))
    return directory


def at(number, **values):
    def change(records):
        return [replace(r, **values) if r.step == number else r for r in records]

    return change


@pytest.mark.parametrize(
    ("change", "allowed", "message"),
    [
        (lambda records: records, 0.0, ""),
        (at(7, loss=falling(6).loss * (1 + 1e-6)), 1e-5, ""),
        (at(7, loss=falling(6).loss * (1 + 1e-6)), 0.0, "losses differ by 1e-06 (no difference"),
        (at(20, lm_loss=falling(19).lm_loss * 0.999), 1e-5, "losses differ by 0.001 (at most"),
        (at(1, aux_loss=2.1), 1e-5, "losses differ by 0.05"),
        (at(3, lm_loss=float("nan")), 1e-5, "a loss is not finite"),
        (lambda records: records[:-1], 1e-5, "19 and 20 steps instead of 20"),
    ],
)
def test_losses_that_differ_are_noticed(steps, tmp_path, change, allowed, message):
    other = written(tmp_path / "other")
    verdict = steps.compare(written(tmp_path / "run", change), other, allowed)
    assert verdict.passed == (not message)
    assert message in verdict.found


def test_equal_nans_are_not_equal_losses(steps, tmp_path):
    broken = at(3, lm_loss=float("nan"))
    runs = [written(tmp_path / name, broken) for name in "ab"]
    assert not steps.compare(*runs, 1e-5).passed


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (lambda records: records, True),
        (lambda records: [replace(r, expert_load=((0.6, 0.4, 0.0),)) for r in records], False),
        (lambda records: [replace(r, lm_loss=10.4) for r in records], False),
    ],
)
def test_an_idle_expert_and_a_loss_that_stays_are_noticed(steps, tmp_path, change, passed):
    runs = [written(tmp_path / name, change) for name in ("many", "one")]
    assert steps.judge_experts(*runs, 1e-5).passed == passed


@pytest.mark.parametrize(("memory", "passed"), [({}, True), ({"device_optimizer": 8}, False)])
def test_an_optimizer_that_stayed_on_the_device_is_noticed(steps, tmp_path, memory, passed):
    device = written(tmp_path / "one")
    verdict = steps.judge_offload(written(tmp_path / "host", **memory), device, 0.0)
    assert verdict.passed == passed


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (lambda records: records, True),
        (lambda records: records[:19], False),
        (at(1, lm_loss=12.0), False),  # ln 32000 = 10.37
        (at(20, skipped=1), False),
        (at(9, lm_loss=float("nan")), False),
        (lambda records: [replace(r, lm_loss=10.4) for r in records], False),
    ],
)
def test_a_course_that_begins_badly_is_noticed(steps, tmp_path, change, passed):
    assert steps.judge_course(written(tmp_path / "run", change)).passed == passed


def aligned(path, **values):
    good = dict(max_abs_diff=1e-6, mean_abs_diff=1e-7, top1_agreement=1.0, tokens=9)
    good |= dict(routing_agreement=1.0, greedy_match=True)
    path.write_text(json.dumps(good | values))
    return path


def test_what_align_wrote(steps, tmp_path):
    path = tmp_path / "align.json"
    assert steps.judge_align(aligned(path)).passed
    for wrong in ({"top1_agreement": 0.9}, {"routing_agreement": 0.9}, {"greedy_match": False}):
        assert not steps.judge_align(aligned(path, **wrong)).passed


def test_a_command_that_fails_fails_every_step_that_needs_it(script, steps, tmp_path, capsys):
    """Its log is shown once, and the rest of the steps go on."""
    options, _, _ = script.parse(["--small", "--output", str(tmp_path)])
    bad = steps.Run("bad", (sys.executable, "-c", "print('planted'); raise SystemExit(3)"))
    good = steps.Run("good", (sys.executable, "-c", ""))
    passes = lambda npu: steps.Verdict(True, "fine")  # noqa: E731
    runner = script.Runner(options)
    found = [
        runner.accept(steps.Step(name, "", "", runs, passes), npu=False)
        for name, runs in (("a", (bad, good)), ("b", (bad,)), ("c", (good,)))
    ]
    assert [verdict.passed for verdict in found] == [False, False, True]
    assert found[1].found == f"bad ended with exit code 3: {tmp_path / 'bad.log'}"
    assert capsys.readouterr().out.count("    | planted\n") == 1


def test_the_small_form_of_a_step(tmp_path):
    """Two real trainings; the other steps of the small form take minutes and are run by hand."""
    command = [sys.executable, str(SCRIPTS / "acceptance.py"), "--small", "--only", "offload"]
    command += ["--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, verdict, last = done.stdout.splitlines()
    assert verdict.startswith("offload      PASS losses differ by 0 (no difference is allowed)")
    assert last.startswith("1 of 1 steps passed on a CPU; no NPU took part; logs: ")
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (again.returncode, again.stdout) == (2, "")
    assert "has a run one: choose another --output" in again.stderr
