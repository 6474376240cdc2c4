"""Stop strings against an oracle that looks at every prefix of the whole text."""

import random

import pytest

from mistral_ms.inference.stopping import StopStrings


def brute_force(text, stops):
    """The text before the stop string that is complete first (the longest of equals)."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(text, generator):
    """Pieces of random lengths, empty ones among them."""
    pieces = []
    while text:
        length = generator.choice([0, 1, 1, 2, 3, 5])
        pieces.append(text[:length])
        text = text[length:]
    return pieces


def run(stops, pieces):
    stopping = StopStrings(stops)
    shown = [stopping.push(piece) for piece in pieces]
    return shown, stopping


def random_case(generator):
    alphabet = generator.choice(["ab", "abc", "a\n▁é"])
    stops = [
        "".join(generator.choices(alphabet, k=generator.randint(1, 5)))
        for _ in range(generator.randint(0, 3))
    ]
    text = "".join(generator.choices(alphabet, k=generator.randint(0, 25)))
    return text, stops


def test_any_cut_of_any_text_gives_what_the_oracle_gives():
    generator = random.Random(3)
    matched = 0
    for _ in range(5000):
        text, stops = random_case(generator)
        expected_text, expected_stop = brute_force(text, stops)
        shown, stopping = run(stops, cut(text, generator))
        assert "".join(shown) + stopping.flush() == expected_text, (text, stops)
        assert stopping.matched == expected_stop
        matched += expected_stop is not None
    assert 1000 < matched < 4500  # both outcomes are well covered


def test_what_is_shown_is_never_taken_back_and_never_held_without_reason():
    """After each character: exactly what no continuation can turn into a stop string is shown."""
    generator = random.Random(4)
    for _ in range(2000):
        text, stops = random_case(generator)
        stopping, shown = StopStrings(stops), ""
        for end, character in enumerate(text, start=1):
            shown += stopping.push(character)
            if stopping.stopped:
                break
            possible = [
                start
                for start in range(end)
                if any(
                    len(stop) > end - start and stop.startswith(text[start:end]) for stop in stops
                )
            ]
            assert shown == text[: min(possible, default=end)]


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "matched"),
    [
        (["\n\n"], ["one\n", "two\n", "\nthree"], ["one", "\ntwo", ""], "\n\n"),
        (["User:"], ["Hi. Us", "e", "r: no"], ["Hi. ", "", ""], "User:"),
        (["User:"], ["Hi. Us", "e", " it"], ["Hi. ", "", "Use it"], None),
        (["aab"], ["aaaab"], ["aa"], "aab"),
        (["abcd", "bc"], ["abcd"], ["a"], "bc"),
        (["bc", "abc"], ["xabc"], ["x"], "abc"),
        (["stop"], ["stop and more", "never seen"], ["", ""], "stop"),
        ([], ["any", "thing"], ["any", "thing"], None),
    ],
    ids=[
        "over_two_tokens",
        "over_three_tokens",
        "false_alarm",
        "overlap_with_itself",
        "first_complete_wins",
        "longest_at_the_same_end",
        "nothing_afterwards",
        "no_stop_strings",
    ],
)
def test_by_hand(stops, pieces, shown, matched):
    pushes, stopping = run(stops, pieces)
    assert pushes == shown
    assert stopping.matched == matched
    assert stopping.stopped == (matched is not None)


def test_flush_gives_out_what_was_held_once():
    stopping = StopStrings(["</s>"])
    assert stopping.push("a</") == "a"
    assert stopping.flush() == "</"
    assert stopping.flush() == ""


def test_flush_after_a_stop_gives_nothing():
    stopping = StopStrings(["stop"])
    assert stopping.push("go stop") == "go "
    assert stopping.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        StopStrings(["a", ""])
