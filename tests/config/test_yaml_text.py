"""YAML that PyYAML's safe loader would take, or would fail on in its own ways."""

import pytest

from mistral_ms.config.yaml_text import MOST_VALUES, parse_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
BAD = {
    LAUGHS: f"more than {MOST_VALUES} values with its aliases written out",
    "&a [*a]": "a value that contains itself",
    "[" * 2000: "nested deeper",
    "a: " + "{b: " * 70 + "1" + "}" * 70: "nested deeper than 64",
    "!!python/object/apply:os.system [true]": "could not determine a constructor",
    "a: 1\nb: 2\na: 3": "'a' occurs twice",
    "a: {b: 1, b: 1}": "'b' occurs twice",
    "a: " + "1:" * 5000 + "1": "a number of 10001 characters",
    "a: 0x" + "f" * 5000: "a number of 5002 characters",
    "a: !!int ''": "index",
    "a: !!bool maybe": "maybe",
    "a: !!timestamp soon": "NoneType",
    "a: 2024-99-99": "month",
    "? [1]\n: 2": "unhashable",
    "---\na: 1\n---\nb: 2": "single document",
    "\ud800": "special characters are not allowed",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=range(len(BAD)))
def test_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_aliases_and_merges_keep_their_meaning():
    text = "base: &b {x: 1, y: [2]}\none: *b\ntwo: {<<: *b, x: 3}\nthree: [*b, *b]\nnone:"
    base = {"x": 1, "y": [2]}
    assert parse_yaml(text) == {
        "base": base,
        "one": base,
        "two": {"x": 3, "y": [2]},
        "three": [base, base],
        "none": None,
    }
    assert parse_yaml("") is None
