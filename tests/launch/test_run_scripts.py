"""Every run file of many processes has a script; what each would start, argument by argument."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS, RUNS = ROOT / "scripts", ROOT / "configs" / "run"
TINY = f"model={ROOT}/configs/model/mixtral_tiny.yaml"
# script: run file, machines, processes on each
STARTED = {
    "pretrain_mistral_7b_1node_8card": ("pretrain_mistral_7b_8card", 1, 8),
    "finetune_mistral_7b_1node_8card": ("finetune_mistral_7b_8card", 1, 8),
    "pretrain_mixtral_8x7b_2node_16card": ("pretrain_mixtral_8x7b_16card", 2, 8),
    "finetune_mixtral_8x7b_2node_16card": ("finetune_mixtral_8x7b_16card", 2, 8),
    "pretrain_mixtral_8x7b_4node_32card": ("pretrain_mixtral_8x7b_32card", 4, 8),
    "finetune_mixtral_8x7b_4node_32card": ("finetune_mixtral_8x7b_32card", 4, 8),
    "pretrain_mixtral_8x7b_8node_64card": ("pretrain_mixtral_8x7b_64card", 8, 8),
    "finetune_mixtral_8x7b_8node_64card": ("finetune_mixtral_8x7b_64card", 8, 8),
    "pretrain_mixtral_8x22b_16node_128card": ("pretrain_mixtral_8x22b_128card", 16, 8),
    "pretrain_mixtral_tiny_200ep": ("pretrain_mixtral_tiny_200ep", 1, 1),
    "pretrain_mixtral_tiny_200ep_ep2pp2": ("pretrain_mixtral_tiny_200ep_ep2pp2", 1, 4),
    "finetune_tiny": ("finetune_tiny", 1, 1),
    "finetune_lora_tiny": ("lora_tiny", 1, 1),
    "finetune_dpo_tiny": ("dpo_tiny", 1, 1),
}


def script(name, *arguments):
    return subprocess.run(
        [str(SCRIPTS / f"{name}.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_no_run_file_and_no_script_is_forgotten():
    assert {run for run, *_ in STARTED.values()} == {
        path.stem
        for path in RUNS.glob("*.yaml")
        # `demo` starts the first, and the others are for `dryrun`
        if path.stem != "demo" and not path.stem.startswith("predict_")
    }
    named = {
        path.stem for kind in ("pretrain", "finetune") for path in SCRIPTS.glob(f"{kind}_*.sh")
    }
    assert named == set(STARTED)


@pytest.mark.parametrize("name", STARTED)
def test_what_a_script_starts(name):
    run, nodes, workers = STARTED[name]
    machine = ["--master", "10.0.0.1", "--node-rank", str(nodes - 1)] if nodes > 1 else []
    takes_any_model = run in ("finetune_tiny", "lora_tiny", "dpo_tiny")
    users = [TINY] if takes_any_model else []  # of a checkpoint
    users += ["checkpoint.save_total_limit=1", "--json", "out.json"]
    done = script(name, *machine, "--port", "9000", "--print", "--", *users)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    config = RUNS / f"{run}.yaml"
    assert done.stdout.split() == [
        "msrun", f"--worker_num={nodes * workers}", f"--local_worker_num={workers}",
        f"--master_addr={'10.0.0.1' if nodes > 1 else '127.0.0.1'}", "--master_port=9000",
        f"--node_rank={nodes - 1}", "--log_dir=runs/logs", "--join=True",
        "--cluster_time_out=600", "--tail_worker_log=0", str(ROOT / "run_mixtral.py"), "train",
        "--config", str(config), *users,
    ]  # fmt: skip


def test_a_users_override_comes_after_the_scripts_own():
    own, users = (
        "parallel.recompute=none",
        ["parallel.recompute=full", "checkpoint.save_total_limit=1"],
    )
    done = script("start_run", "pretrain_mistral_7b_8card", own, "--workers", "8", "--print", "--",
                  *users)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == [own, *users]


def test_without_arguments_the_flags_are_named():
    done = script("pretrain_mixtral_8x7b_2node_16card")
    assert done.returncode == 2
    assert "--nodes needs --master, the address of machine 0" in done.stderr
    done = script("start_run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "NAME is a file of configs/run" in done.stdout


def test_a_run_file_that_is_not_there():
    done = script("start_run", "nowhere", "--workers", "1", "--print")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere.yaml" in done.stderr
