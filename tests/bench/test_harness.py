"""The harness of the benchmarks with sides that only pretend; and a real one."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks import checkpoints, convert, page, report
from benchmarks.fits import fit
from benchmarks.harness import BenchmarkError, Measured, SideSpec, _bases, compare, measure, started
from benchmarks.peer import repeated
from benchmarks.suite import SUITE

HERE = Path(__file__).parent
PATHS = {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}


def side(name, compared="", **options):
    options = {"environment": PATHS, **options}
    return SideSpec(name, f"fakes:{name}", compared, **options)


def diary(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(sides, tmp_path, sizes=(1,), rounds=3):
    cases = [{"size": size, "diary": str(tmp_path / "diary")} for size in sizes]
    lines = []
    with started(sides, lines.append) as running:
        return measure(running, cases, rounds=rounds, say=lines.append), lines


@pytest.mark.slow
def test_sides_take_turns_and_ratios_are_speeds(tmp_path):
    sides = [side("ours", "a"), side("theirs", "a"), side("best", limit=True)]
    (measured,), lines = run(sides, tmp_path)
    asked = [entry[:2] for entry in diary(tmp_path / "diary")]
    names = ["ours", "theirs", "best"]
    assert asked[:3] == [[name, "prepare"] for name in names]
    turns = [name for name, what in asked if what == "measure"]
    assert turns == ["ours", "theirs", "best", "theirs", "best", "ours", "best", "ours", "theirs"]
    (row,) = measured.rows()
    assert row["name"] == "work"
    assert row["seconds"] == pytest.approx(1e-3)
    assert row["peers"] == {"theirs": pytest.approx(2e-3)}
    assert row["ratios"] == {"theirs": pytest.approx(2.0)}
    assert row["limit_fraction"] == pytest.approx(0.5)
    assert row["facts"]["ours"]["bytes"] == 3
    worst, beyond = row["differences"]["theirs"]
    assert 0 < worst < 1e-6
    assert beyond == 0
    assert "speed over theirs 2.00; 50% of the limit" in lines[-1]


def test_a_ratio_is_to_the_side_that_does_the_same():
    names = {"ours": "a", "ours, capped": "b", "theirs": "a", "theirs, capped": "b", "free": ""}
    bases = _bases([SideSpec(name, "", group) for name, group in names.items()])
    assert bases == {"theirs, capped": "ours, capped"}
    seconds = {"work": {name: [float(n)] for n, name in enumerate(names, 1)}}
    (row,) = Measured({}, seconds, {}, {}, (), {}, bases).rows()
    assert row["ratios"] == {"ours, capped": 2, "theirs": 3, "theirs, capped": 2, "free": 5}
    assert row["bases"] == bases


@pytest.mark.slow
def test_only_one_side_runs(tmp_path):
    """While a side measures, the processes of the others are stopped."""
    with started([side("ours"), side("theirs")], print) as running:
        pids = [str(each._processes[0].pid) for each in running.values()]
        case = {"size": 1, "diary": str(tmp_path / "diary"), "watched": pids}
        measure(running, [case], rounds=2)
    entries = diary(tmp_path / "diary")
    assert {entry[3] for entry in entries} == set(map(int, pids))
    for _, what, states, pid in entries:
        states = dict(zip(map(int, pids), states, strict=True))
        assert states.pop(pid) == "R", what
        assert list(states.values()) == ["T"], what


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", r"(?s)wrong does not compute what ours does: answer: 33.33% .* up to 0.125"),
        ("other", r"other: answer is \(2,\), not \(3,\)"),
        ("broken", r"(?s)broken: Traceback.*ValueError: no such kernel"),
    ],
)
def test_nothing_is_timed_before_outputs_agree(tmp_path, name, message):
    with pytest.raises(BenchmarkError, match=message):
        run([side("ours", "a"), side(name, "a")], tmp_path)
    assert "measure" not in [entry[1] for entry in diary(tmp_path / "diary")]


@pytest.mark.slow
def test_a_side_that_does_not_start_is_named(tmp_path):
    with pytest.raises(BenchmarkError, match=r"(?s)missing: ended.*has no attribute 'missing'"):
        run([side("missing")], tmp_path)


@pytest.mark.slow
def test_of_a_job_the_slowest_rank_counts():
    with started([side("rank", processes=2, scheduled=False)], print) as running:
        (measured,) = measure(running, [{}], rounds=1)
    assert measured.seconds == {"work": {"rank": [2.0]}}


def test_few_rows_may_differ_where_that_is_said():
    want = np.arange(40.0).reshape(20, 2)
    got = want.copy()
    got[3, 1] = 1.0
    sides = [SideSpec("a", "", "x"), SideSpec("b", "", "x", flips=0.05)]
    found = compare(sides, {"a": {"y": want}, "b": {"y": got}})
    assert found == {"b": (pytest.approx(6 / 39), pytest.approx(0.05))}
    got[4, 1] = np.nan
    with pytest.raises(BenchmarkError, match=r"10\.00% of the rows"):
        compare(sides, {"a": {"y": want}, "b": {"y": got}})


def test_short_calls_are_repeated():
    calls = []
    seconds = repeated(lambda: calls.append(1))
    before = len(calls)
    assert seconds() < 1e-3
    assert len(calls) - before == 50


def test_growth_is_found_again():
    x = [64, 256, 1024, 4096]
    line = fit(x, [3e-3 + 2e-5 * each for each in x])
    assert (line.kind, line.a, line.b) == ("line", pytest.approx(3e-3), pytest.approx(2e-5))
    power = fit(x, [2e-4 * each**0.7 for each in x])
    assert (power.kind, power.a, power.b) == ("power", pytest.approx(2e-4), pytest.approx(0.7))
    bent = fit(x, [1e-3, 1e-3, 1e-3, 1e-2])
    assert bent.residual > 0.2
    assert fit([1, 2], [1.0, 2.0]) is None


@pytest.mark.slow
def test_tables_and_growth_of_a_result(tmp_path):
    sides = [side("ours", "a"), side("theirs", "a", changed="nothing but its name")]
    cases = [
        {"tokens": n, "experts": 8, "size": n, "diary": str(tmp_path / "diary")} for n in (1, 2, 4)
    ]
    with started(sides, print) as running:
        result = report.result("moe", measure(running, cases, rounds=1), 1.0)
    json.dumps(result)
    assert {
        (each["side"], each["axis"], each["others"]["experts"]) for each in result["growth"]
    } == {
        ("ours", "tokens", 8),
        ("theirs", "tokens", 8),
    }
    assert all(each["residual"] < 1e-9 for each in result["growth"])
    table = report.table(result).splitlines()
    assert table[0] == "| experts | tokens |  | ours, ms | over theirs |"
    assert table[2] == "| 8 | 1 | work | 1 | 2.00 (2.00 to 2.00) |"
    assert "| work, experts 8 | theirs | 0 ms + 2 ms x tokens, within 0% |" in table
    assert table[-1] == "Changed in theirs: nothing but its name."


def test_a_conversion_and_a_copy(tmp_path):
    """The real sides of ``convert``, with a tiny checkpoint."""
    source = checkpoints.write(
        tmp_path / "hf", {**checkpoints.mixtral(1, checkpoints.TINY), "vocab_size": 99}
    )
    case = {"checkpoint": str(source), "folder": str(tmp_path), "figure": "convert"}
    ours, copied = convert.ours(case), convert.copy(case)
    assert len(ours.outputs["checksums"]) == 3 + 2 + 4 + 1 + 3 * 4
    sides = [SideSpec("ours", "", "x", 0.0), SideSpec("cp", "", "x", 0.0)]
    assert compare(sides, {"ours": ours.outputs, "cp": copied.outputs}) == {"cp": (0.0, 0.0)}
    assert ours.measure()["convert"] > 0
    assert not list(tmp_path.glob("target-*"))


def test_the_weights_that_a_token_reads_are_counted():
    config = checkpoints.mixtral(2)
    per_layer = 2 * 512 * 512 + 2 * 512 * 128 + 2 * 3 * 512 * 1792
    assert checkpoints.active_weights(config) == 2 * per_layer + 32000 * 512
    assert checkpoints.active_weights(config, 10**6) > 3 * checkpoints.active_weights(config) / 2


def test_the_command_names_every_benchmark():
    from mistral_ms.cli.bench import NAMES

    assert (*SUITE, "all") == NAMES


def test_a_page_gets_tables_and_pictures(tmp_path):
    """Of invented times; a block without results stays."""
    sides = ("mistral_ms", "transformers", "products alone")
    measured = [
        Measured(
            {"tokens": tokens, "experts": 8, "intermediate": 16},
            {"forward": {name: [1e-4 * n * tokens] * 3 for n, name in enumerate(sides, 1)}},
            {name: {} for name in sides},
            {},
            ("products alone",),
            {"transformers": "its dtype"},
        )
        for tokens in (64, 128, 256)
    ]
    results = {"moe": json.loads(json.dumps(report.result("moe", measured, 60.0)))}
    names = ("moe", "train", "machine")
    blocks = "".join(f"# {n}\n<!-- results: {n} -->\nold\n<!-- end -->\n" for n in names)
    (tmp_path / "images").mkdir()
    found = page.fill(blocks, results, tmp_path / "images")
    assert found.count("\nold\n") == 1
    assert "The whole took 1 minutes" in found
    assert "| 8 | 16 | 64 | forward | 6.4 | 2.00 (2.00 to 2.00) | 300% |" in found
    assert "(images/bench_moe_tokens.png)" in found
    (picture,) = (tmp_path / "images").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert page.fill(found, results, tmp_path / "images") == found
    chinese = page.fill(blocks, results, tmp_path / "images", chinese=True)
    sentences = [text for text in found.splitlines() if text not in chinese.splitlines()]
    starts = ("How it grows", "Changed in transformers: its dtype.")
    assert [text.startswith(starts) for text in sentences] == [True, True, False]
    assert "全部用时 1 分钟" in chinese and "transformers 中的改动：its dtype。" in chinese


def test_an_installed_package_says_where_the_benchmarks_are(tmp_path, monkeypatch):
    import mistral_ms
    from mistral_ms.cli.bench import bench
    from mistral_ms.errors import ConfigError

    monkeypatch.setattr(mistral_ms, "__file__", str(tmp_path / "mistral_ms" / "__init__.py"))
    with pytest.raises(ConfigError, match=r"no benchmarks here: .* in a checkout"):
        bench("moe")
