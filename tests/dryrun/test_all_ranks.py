"""``dryrun --rank all`` on a whole layout: the ranks' reports must fit together.

Each rank is compiled alone and says what it believes; that they believe the same is only seen when
all of them are laid side by side.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "run" / "pretrain_mixtral_tiny_200ep_ep2pp2.yaml"
DP = MICRO = 2  # and two stages: ranks 0, 1 and 2, 3
EXPERTS, HIDDEN, SEQUENCE, BATCH = 8, 128, 64, 16
ROWS = BATCH // DP // MICRO  # of a rank's micro-batch
CAPACITY = 71  # ceil(1.1 * 2 * ROWS * SEQUENCE / EXPERTS)
FLOAT = 4
FORWARD_TO, BACKWARD_TO = DP, -DP
ENDS = ("Send", "Receive")


@pytest.fixture(scope="module")
def reports(command, tmp_path_factory):
    directory = tmp_path_factory.mktemp("all")
    out = directory / "all.json"
    done = command("--config", CONFIG, "--rank", "all", "--json", out, "--logs", directory)
    assert done.exit_code == 0, done.output
    assert "communication operators as planned" in done.output
    said = [x for x in done.output.splitlines() if x.startswith("rank ")]
    assert [x.split(" compiled")[0] for x in said] == [
        "rank 0 (stage 0)", "rank 1 (stage 0)", "rank 2 (stage 1)", "rank 3 (stage 1)",
    ]  # fmt: skip
    return json.loads(out.read_text())


def what(line):
    return line["operator"], line["phase"], tuple(line["ranks"]), line["bytes"]


def disagreements(found):
    """Everything in which the ranks do not fit together; empty when they do."""
    stages = {each["rank"]: each["stage"] for each in found["ranks"]}
    counts = {rank: Counter() for rank in stages}
    wrong = []
    for each in found["ranks"]:
        rank = each["rank"]
        for line in each["communication"]:
            counts[rank][what(line)] += line["count"]
            if rank not in line["ranks"]:
                wrong.append(f"rank {rank} is not of its own group: {line}")
            if line["group"] == "other":
                wrong.append(f"a group that the layout does not have: {line}")
    for rank, mine in counts.items():
        for (operator, phase, ranks, size), count in mine.items():
            if operator not in ENDS:
                others = [counts[r][operator, phase, ranks, size] for r in ranks]
                if others != [count] * len(ranks):
                    wrong.append(f"{operator} {phase} {ranks} {size}: {others}")
                continue
            (peer,) = set(ranks) - {rank}
            other_end = ENDS[1 - ENDS.index(operator)]
            if counts[peer][other_end, phase, ranks, size] != count:
                wrong.append(f"{operator} of rank {rank} without {other_end} of rank {peer}")
            way = 1 if phase == "forward" else -1
            if stages[peer] - stages[rank] != (way if operator == "Send" else -way):
                wrong.append(f"{operator} {phase} from stage {stages[rank]} to {stages[peer]}")
    return wrong


def test_every_rank_is_reported_once_and_in_order(reports):
    assert [(each["rank"], each["stage"]) for each in reports["ranks"]] == [
        (0, 0), (1, 0), (2, 1), (3, 1),
    ]  # fmt: skip
    for key, total in reports["sent"].items():
        assert total == sum(each["sent"][key] for each in reports["ranks"])
    for key in ("parameter_bytes", "optimizer_bytes"):
        assert reports[f"max_{key}"] == max(each[key] for each in reports["ranks"]) > 0


def test_what_the_ranks_send_and_expect_fits_together(reports):
    assert disagreements(reports) == []


def test_the_exchanges_of_each_rank(reports):
    """Counted by hand: one sparse layer a stage, two all-to-alls each way; one message each way."""
    rows = EXPERTS * CAPACITY * HIDDEN * FLOAT
    states = ROWS * SEQUENCE * HIDDEN * FLOAT
    for each in reports["ranks"]:
        rank, first = each["rank"], each["rank"] < DP
        stage = (0, 1) if first else (2, 3)
        pair = (rank, rank + DP) if first else (rank - DP, rank)
        found = Counter()
        for line in each["communication"]:
            if line["operator"] in ("AlltoAll", *ENDS):
                found[what(line)] += line["count"]
        there, back = ENDS if first else ENDS[::-1]
        assert found == {
            ("AlltoAll", "forward", stage, rows): 2 * MICRO,
            ("AlltoAll", "backward", stage, rows): 2 * MICRO,
            (there, "forward", pair, states): MICRO,
            (back, "backward", pair, states): MICRO,
        }


def test_the_planners_numbers_stand_beside(reports):
    """And are the same, but for a few numbers that the graph keeps beside the weights: MindSpore's
    step and rate, and the buffers of figures, of each layer 18 and two.
    """
    for each in reports["ranks"]:
        planned = each["planned"]
        assert each["optimizer_bytes"] == planned["optimizer_bytes"]
        for key in ("parameter_bytes", "gradient_bytes"):
            assert 0 <= each[key] - planned[key] < 400
        assert planned["communication"]
        for line in planned["communication"]:
            assert line["compiled"] == line["planned"] > 0, line


def first_line(report, operator):
    return next(x for x in report["communication"] if x["operator"] == operator)


def without_a_receive(found):
    found["ranks"][2]["communication"].remove(first_line(found["ranks"][2], "Receive"))


def sent_to_the_wrong_stage(found):
    found["ranks"][0]["stage"] = 2


def one_message_too_many(found):
    first_line(found["ranks"][1], "Send")["count"] += 1


def other_members(found):
    first_line(found["ranks"][3], "AlltoAll")["ranks"] = [1, 3]


def one_exchange_less(found):
    first_line(found["ranks"][0], "AlltoAll")["count"] -= 1


def half_the_bytes(found):
    first_line(found["ranks"][1], "AllReduce")["bytes"] //= 2


def somebody_elses_group(found):
    first_line(found["ranks"][0], "AlltoAll")["ranks"] = [2, 3]


@pytest.mark.parametrize(
    "spoil",
    [
        without_a_receive,
        sent_to_the_wrong_stage,
        one_message_too_many,
        other_members,
        one_exchange_less,
        half_the_bytes,
        somebody_elses_group,
    ],
)
def test_ranks_that_do_not_fit_together_would_be_noticed(reports, spoil):
    spoilt = copy.deepcopy(reports)
    spoil(spoilt)
    assert disagreements(spoilt)
