"""What the scripts would start, argument by argument, and what they refuse to start."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mistral_ms.launch.checks import (
    check_devices,
    check_hccl,
    check_logs,
    check_port,
    check_rank_tables,
    check_run,
    check_script,
)
from mistral_ms.launch.options import Options, parse
from mistral_ms.launch.tasks import ReadTask, TrainTask

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "run" / "pretrain_mixtral_tiny_200ep.yaml"


def script(name, *arguments):
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        [str(ROOT / "scripts" / name), *arguments], env=environment, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def layout(tmp_path, **parallel):
    """A run file with a layout of its own."""
    run = yaml.safe_load(CONFIG.read_text())
    run["model"] = str((CONFIG.parent / run["model"]).resolve())
    run["parallel"] = parallel
    run["training"]["global_batch_size"] = 32
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.mark.parametrize("node", range(4))
def test_four_machines_of_eight_cards(tmp_path, node):
    config = layout(tmp_path, dp=16, ep=8, pp=2)
    values = ["training.max_steps=70"]
    values += ["model.moe.gate=sigmoid_top_k"] if node == 0 else []  # a name that is imported
    done = script(
        "pretrain_mixtral_8x7b_4node_32card.sh", "--node-rank", str(node), "--master", "10.0.0.1",
        "--config", str(config), "--log-dir", "logs", "--print", "--", *values,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "msrun", "--worker_num=32", "--local_worker_num=8", "--master_addr=10.0.0.1",
        "--master_port=8118", f"--node_rank={node}", "--log_dir=logs", "--join=True",
        "--cluster_time_out=600", "--tail_worker_log=0", str(ROOT / "run_mixtral.py"), "train",
        "--config", str(config), *values,
    ]  # fmt: skip


def test_generation_on_two_machines():
    done = script(
        "msrun_generate.sh", "--workers", "4", "--nodes", "2", "--node-rank", "1", "--master",
        "10.0.0.1", "--mp", "2", "--dp", "2", "--pp", "2", "--ep", "2", "--print", "--", "ckpt",
        "--prompt", "Once upon", "--json", "out.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout) == [
        "msrun", "--worker_num=8", "--local_worker_num=4", "--master_addr=10.0.0.1",
        "--master_port=8118", "--node_rank=1", "--log_dir=runs/logs", "--join=True",
        "--cluster_time_out=600", "--tail_worker_log=0", str(ROOT / "run_mixtral.py"), "generate",
        "ckpt", "--prompt", "Once upon", "--json", "out.json",
        "--dp", "2", "--mp", "2", "--pp", "2", "--ep", "2",
    ]  # fmt: skip


def test_alignment_with_four_processes():
    done = script("msrun_generate.sh", "--align", "--workers", "4", "--pp", "4", "--print", "--",
                  "hf", "ckpt")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[11:15] == ["align", "hf", "ckpt", "--dp"]


def test_generation_for_another_number_of_processes():
    done = script("msrun_generate.sh", "--workers", "3", "--pp", "2", "--print", "--", "ckpt")
    assert (done.returncode, done.stdout) == (2, "")
    assert "the layout of generate (dp=1 mp=1 pp=2 ep=1) is for 2 processes" in done.stderr
    done = script("msrun_generate.sh", "--workers", "2", "--dp", "2", "--ep", "3", "--print")
    assert done.returncode == 2 and "ep (3) must divide dp (2)" in done.stderr


def test_a_launcher_that_there_is_not(capsys):
    from mistral_ms.launch.__main__ import main

    assert main(["sing", "--workers", "2"]) == 2
    assert "'sing' is not one of train, generate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "task",
    [
        TrainTask(Path("run.yaml"), ("--resume", "here", "--json", "f", "a=b")),
        ReadTask(
            "generate",
            (2, 1, 1, 2),
            (
                "ckpt", "--prompt", "T", "--max-new-tokens", "1", "--temperature", "0", "--top-p",
                "1", "--top-k", "0", "--repetition-penalty", "1", "--seed", "0", "--stop", "x",
                "--chat", "--max-length", "9", "--from", "hf", "--dtype", "fp16", "--pynative",
                "--json", "f",
            ),
        ),
        ReadTask("align", (1, 2, 1, 1), ("hf", "ckpt", "--prompts", "f", "--tolerance", "1")),
    ],
)  # fmt: skip
def test_msrun_takes_no_flag_for_its_own(tmp_path, task):
    """Its own parser reads the command; nothing is started."""
    from mistral_ms.launch.command import msrun_command

    arguments = msrun_command(Options(task, 2, log_dir=tmp_path))[1:]
    code = (
        "import sys; from mindspore.parallel.cluster.run import get_args\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "a = get_args(); print(a.worker_num, a.join, a.node_rank, a.task_script_args)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"2 True 0 {list(task.command)}"


def test_a_layout_for_another_number_of_processes():
    done = script("msrun_train.sh", "--config", str(CONFIG), "--workers", "3", "--print")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is for 1 processes, but --nodes 1 times --workers 3 are 3" in done.stderr


def test_help_names_every_flag():
    done = script("msrun_train.sh", "--help")
    assert done.returncode == 0
    flags = "config workers nodes node-rank master port log-dir print step-limit slow-limit"
    for flag in flags.split():
        assert f"--{flag}" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers must be at least 1"),
        (["--workers", "8", "--nodes", "4"], "--nodes needs --master"),
        (["--workers", "8", "--node-rank", "1"], "--node-rank must be 0 to 0"),
    ],
)
def test_flags_that_cannot_be(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--config", "run.yaml", *flags], "train")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def only(findings):
    (found,) = list(findings)
    return found


def options(**values):
    return Options(**{"task": TrainTask(CONFIG), "workers": 8, **values})


def test_a_run_file_that_is_not_there():
    found = only(check_run(options(task=TrainTask(Path("nowhere.yaml")))))
    assert found.fatal and "nowhere.yaml" in found.message


def test_nodes_that_the_layout_does_not_know(tmp_path):
    config = layout(tmp_path, dp=16, ep=8, devices_per_node=4, all_to_all="hierarchical")
    found = only(check_run(options(task=TrainTask(config), nodes=2)))
    assert found.fatal and "devices_per_node (4) is not --workers (8)" in found.message


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "is taken" in only(check_port(options(port=port))).message
        assert not list(check_port(options(port=port, nodes=2, node_rank=1, master="127.0.0.1")))
    assert not list(check_port(options(port=port)))


def test_a_master_that_is_another_machine():
    message = only(check_port(options(master="203.0.113.7", nodes=2))).message
    assert "is not an address of this machine, which has --node-rank 0" in message


def test_logs_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert "choose another --log-dir" in only(check_logs(tmp_path / "file" / "logs")).message
    assert not list(check_logs(tmp_path / "a" / "b"))


def test_launchers_check_one_directory_at_the_same_time(tmp_path, monkeypatch):
    """Another launcher begins and ends its check while the first one is at it."""
    touch, others = Path.touch, []

    def touch_and_be_overtaken(path, *args, **options):
        touch(path, *args, **options)
        monkeypatch.setattr(Path, "touch", touch)
        monkeypatch.setattr("os.getpid", lambda: 1)
        others.extend(check_logs(tmp_path))

    monkeypatch.setattr(Path, "touch", touch_and_be_overtaken)
    assert not list(check_logs(tmp_path))
    assert not others
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("visible", "message"),
    [("0,1,2", "shows 3 devices for --workers 8"), ("0,1,1", "names a device twice")],
)
def test_too_few_devices(visible, message):
    found = only(check_devices(options(), {"ASCEND_RT_VISIBLE_DEVICES": visible}))
    assert found.fatal and message in found.message


@pytest.mark.parametrize("name", ["RANK_TABLE_FILE", "MINDSPORE_HCCL_CONFIG_PATH", "MS_ROLE"])
def test_what_contradicts_msrun(name):
    found = only(check_rank_tables({name: "x"}))
    assert found.fatal and found.message.startswith(f"{name}=x")


def test_another_python_than_msruns(tmp_path):
    for folder, program in (("a", "python"), ("b", "python"), ("b", "msrun")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / program).touch()
    a, b = tmp_path / "a", tmp_path / "b"
    assert "put msrun's directory first" in only(check_script({"PATH": f"{a}:{b}"})).message
    assert not list(check_script({"PATH": f"{b}:{a}"}))
    assert "not on the PATH" in only(check_script({"PATH": str(a)})).message


def test_advice_on_hccl_never_stops_a_job():
    several = options(nodes=2, master="10.0.0.1")
    found = list(check_hccl(several, {}))
    assert [f.fatal for f in found] == [False, False]
    assert not list(check_hccl(options(), {}))
    good = {"HCCL_CONNECT_TIMEOUT": "1200", "HCCL_SOCKET_IFNAME": "eth0"}
    assert not list(check_hccl(several, good))
    short = only(check_hccl(several, {**good, "HCCL_EXEC_TIMEOUT": "60"}))
    assert not short.fatal and "short" in short.message
    assert only(check_hccl(several, {**good, "HCCL_EXEC_TIMEOUT": "1h"})).fatal


HOSTILE = ["$(touch X)", "`touch X`", "a;touch X", "a b", "a'b", 'a"b', "a\nb", "-rf", "*", "a|b"]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_log_directory_that_a_shell_would_read_is_refused(value, capsys):
    """msrun calls os.system with it when a job fails."""
    with pytest.raises(SystemExit) as ended:
        parse(["--config", str(CONFIG), "--workers", "1", f"--log-dir={value}", "--print"], "train")
    assert ended.value.code == 2
    assert "--log-dir" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["runs/logs", "/data/läufe/2024-01-01T10:00_a+b@c,d=1%"])
def test_a_harmless_log_directory_is_taken(value):
    flags = ["--config", str(CONFIG), "--workers", "1", "--log-dir", value]
    assert parse(flags, "train").log_dir == Path(value)


def test_no_script_lets_a_shell_read_its_arguments(tmp_path):
    """What stands after -- arrives letter by letter, and nothing in it was run."""
    own = "output=$(touch X)"
    done = subprocess.run(
        [ROOT / "scripts" / "start_run.sh", "pretrain_mixtral_tiny_200ep", own,
         "--workers", "1", "--print", "--", *HOSTILE],
        cwd=tmp_path, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout)[-len(HOSTILE) - 1 :] == [own, *HOSTILE]
    assert list(tmp_path.iterdir()) == []
