"""What the launcher makes of ranks that die or hang. The ranks compute nothing, they only beat; the
same with real trainings is in tests/distributed/test_launch.py.
"""

import re
import time

import pytest
import yaml
from launch.jobs import finish, left_behind, start
from support.ports import free_port

from mistral_ms.launch.heartbeat import read_beat

RUN = dict(
    model=dict(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
               num_attention_heads=2, num_key_value_heads=1, moe=dict(num_local_experts=4)),
    training=dict(max_steps=6, seq_length=8, global_batch_size=8),
    data=dict(inputs=["text.txt"], tokenizer="packaged-v1"),
)  # fmt: skip


@pytest.fixture
def root(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "text.txt").write_text("a text")
    return tmp_path


def launch(root, workers, *flags, log_dir="logs", nodes=1, **variables):
    """One launcher for each machine, all of them on this one."""
    common = ["--workers", str(workers), "--log-dir", log_dir, "--port", str(free_port()), *flags]
    layout = [f"parallel.dp={workers * nodes}"]
    if nodes > 1:
        common += ["--nodes", str(nodes), "--master", "127.0.0.1"]
        layout += [f"parallel.devices_per_node={workers}"]
    return [
        start(root, *common, "--node-rank", str(n), overrides=layout, stand_in=True, **variables)
        for n in range(nodes)
    ]


FAULTS = {
    "SIGKILL": r"rank 1 failed in step 5: killed by SIGKILL: log \S*worker_1\.log",
    "raise": r"rank 1 failed in step 5: RuntimeError: planted: log \S*worker_1\.log",
    "SIGSTOP": r"rank 1 failed in step 5: stuck: .*a signal has stopped its process",
    "sleep": r"rank 1 failed in step 5: stuck: no sign of life .*"
    r"not where the others wait, but in .*rank\.py.* in misbehave",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_rank_that_fails_ends_the_job_by_name(root, kind):
    [process] = launch(root, 4, "--step-limit", "2", FAULT=f"1:4:{kind}")
    said = finish(process)
    assert process.returncode == 1, said
    assert time.time() - float((root / "fault").read_text()) < 30
    assert re.search(FAULTS[kind], said.splitlines()[-1]), said
    if kind in ("raise", "SIGKILL"):
        assert "last lines of" in said
    if kind == "sleep":
        assert "where rank 1 was, innermost first" in said
    assert not left_behind(root)


def test_a_crash_after_all_work_is_done_is_a_warning(root):
    [process] = launch(root, 2, FAULT="1:end:SIGSEGV")
    said = finish(process)
    assert process.returncode == 0, said
    warning = "warning: rank 1 was ended by SIGSEGV after all ranks had finished their work"
    assert said.splitlines()[-1] == warning
    assert "lm loss" in said
    assert not left_behind(root)


def test_who_gave_up_waiting_is_not_to_blame(root):
    """Collective operations end with an error of their own before the step's limit is reached."""
    [process] = launch(root, 4, "--step-limit", "6", FAULT="1:4:sleep", GIVE_UP="4.5")
    said = finish(process)
    assert process.returncode == 1
    last = said.splitlines()[-1]
    assert re.search("rank 1 failed in step 5: stuck: others gave up waiting for it", last), said
    assert "AllReduce: no answer" in last
    assert not left_behind(root)


def test_nobody_is_blamed_where_nobody_stands_out(root):
    """Every rank gives up waiting, and none is known to be dead or stuck."""
    [process] = launch(root, 4, GIVE_UP="0")
    said = finish(process)
    assert process.returncode == 1
    assert "it gave up waiting for other ranks: RuntimeError: AllReduce: no answer" in said
    assert not left_behind(root)


def test_two_machines_end_well_together(root):
    nodes = launch(root, 1, nodes=2)
    said = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert "lm loss" in said[0]
    assert "lm loss" not in said[1]
    logs = {path.name for path in (root / "logs").glob("worker_*.log")}
    assert logs == {"worker_0.log", "worker_1.log"}
    assert not left_behind(root)


def test_a_failure_on_one_machine_ends_the_other(root):
    nodes = launch(root, 2, nodes=2, FAULT="3:3:SIGKILL")
    said = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], "\n".join(said)
    assert "another machine says: rank 3 failed in step 4: killed by SIGKILL" in said[0]
    assert not left_behind(root)
    again = launch(root, 2, nodes=2)  # what the failed job has left in the directory is history
    assert [finish(node) and node.returncode for node in again] == [0, 0]


def test_a_polite_end_lets_every_rank_save(root):
    [process] = launch(root, 2, STEPS="100000")
    wait_for_step(process, root, 3)
    process.terminate()
    said = finish(process)
    assert process.returncode == 128 + 15, said
    assert all((root / f"saved_{rank}").exists() for rank in range(2))
    assert not left_behind(root)


def test_a_scheduler_whose_ranks_have_left_is_not_waited_for(root):
    """It waits for ranks that left without a word, and msrun waits for it."""
    [process] = launch(root, 2, STEPS="100000", LEAVE="1")
    wait_for_step(process, root, 1)
    process.terminate()
    begun = time.time()
    said = finish(process)
    assert process.returncode == 128 + 15, said
    assert time.time() - begun < 60  # a grace of 10 s; it lets ranks save for 600 s
    assert not left_behind(root)


def test_a_second_signal_ends_ranks_that_do_not(root):
    [process] = launch(root, 2, STEPS="100000", FAULT="1:1:sleep")
    wait_for_step(process, root, 1)
    process.terminate()
    time.sleep(2)  # two looks of the launcher
    assert process.poll() is None
    process.terminate()
    begun = time.time()
    said = finish(process)
    assert process.returncode == 128 + 15, said
    assert time.time() - begun < 30
    assert not left_behind(root)


def wait_for_step(process, root, step):
    """Until both ranks have done it."""
    deadline = time.time() + 60
    while True:
        beats = [read_beat(root / "logs" / "heartbeat", rank) for rank in range(2)]
        if all(beat is not None and beat.step >= step for beat in beats):
            return
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)


def test_a_run_that_cannot_begin_says_why(root):
    [process] = launch(root, 2, CANNOT_BEGIN="1")
    said = finish(process)
    assert process.returncode == 1, said
    assert re.search(r"error: rank [01] failed.*log logs/worker_[01]\.log", said.splitlines()[-1])
    assert "nothing to resume" in said
    assert not left_behind(root)
