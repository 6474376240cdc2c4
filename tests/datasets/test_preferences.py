"""Pairs of answers: what is read, what of it is learnt, what is refused."""

import re

import numpy as np
import pytest

from mistral_ms.config import PackingConfig
from mistral_ms.datasets.preferences import PreferenceSequences, read_preferences
from mistral_ms.errors import DataError
from mistral_ms.tokenizer import ChatFormat

TEXTS = {"prompt": "The harbour", "chosen": " wakes before noon.", "rejected": "s are many"}
USER = {"role": "user", "content": "Which tide?"}
EBB = {"role": "assistant", "content": "The ebb."}
FLOOD = {"role": "assistant", "content": "The flood, twice."}
ASIDE = {"role": "assistant", "content": "Which one do you mean?"}
S = 24


def read(paths, tokenizer, **packing):
    sequences, errors, skipped = read_preferences(
        paths, tokenizer, PackingConfig(**packing), seq_length=S, batch_size=1, seed=0
    )
    return sequences, errors, skipped


def rows(sequences, pair=0):
    """Of both rows the tokens, and those that are predicted."""
    batch = sequences.read(np.array([pair], np.int32))
    found = []
    for ids, labels, positions in zip(
        batch.ids_BS, batch.labels_BS, batch.positions_BS, strict=True
    ):
        inputs = int((positions >= 0).sum())
        assert positions.tolist() == [*range(inputs), *[-1] * (S - inputs)]
        counted = labels[labels != -100].tolist()
        assert labels[inputs - len(counted) : inputs].tolist() == counted  # the end of the row
        found.append(([*ids[:inputs].tolist(), counted[-1]], counted))
    return found


def test_texts(jsonl, tokenizer):
    """The answer begins where its tokens differ from those of the prompt alone, and ends with EOS:
    "harbour" and "s" may become other tokens than "harbour" has.
    """
    path = jsonl(TEXTS | {"score": 3})
    (chosen, first), (rejected, second) = rows(read([path], tokenizer)[0])
    encode = tokenizer.encode
    prompt = [1, *encode(TEXTS["prompt"], bos=False)]
    assert chosen == [1, *encode("The harbour wakes before noon.", bos=False), 2]
    assert first == chosen[len(prompt) :]
    assert chosen[: len(prompt)] == prompt
    assert rejected == [1, *encode("The harbours are many", bos=False), 2]
    same = next(n for n, (a, b) in enumerate(zip(prompt, rejected, strict=False)) if a != b)
    assert same < len(prompt), "the case wants an answer that changes the prompt's last token"
    assert second == rejected[same:]
    bare, _ = rows(read([path], tokenizer, add_bos=False, add_eos=False)[0])[0]
    assert bare == chosen[1:-1]


def test_messages(jsonl, tokenizer):
    """Formatted as the model's conversations; answers in the prompt are not learnt."""
    prompt = [USER, ASIDE, USER]
    whole = {"chosen": [*prompt, EBB], "rejected": [*prompt, FLOOD]}
    path = jsonl(
        {"prompt": prompt, "chosen": [EBB], "rejected": [FLOOD]}, whole, whole | {"prompt": None}
    )
    sequences, _, _ = read_preferences(
        [path], tokenizer, PackingConfig(), seq_length=64, batch_size=1, seed=0
    )
    chat = ChatFormat(tokenizer)
    before = chat.encode_chat(prompt)
    for pair in (0, 1, 2):
        batch = sequences.read(np.array([pair], np.int32))
        for number, answer in enumerate((EBB, FLOOD)):
            ids = chat.encode_dialogue([*prompt, answer]).ids
            labels = batch.labels_BS[number][: len(ids) - 1].tolist()
            assert batch.ids_BS[number][: len(ids) - 1].tolist() == ids[:-1]
            assert labels == [-100] * (len(before) - 1) + ids[len(before) :]


def test_batches_keep_pairs_together(jsonl, tokenizer):
    """Parts of a batch hold whole pairs, and a step's pairs follow from seed and step."""
    path = jsonl(*(TEXTS | {"prompt": f"Number {n}:"} for n in range(5)))
    made = read_preferences([path], tokenizer, PackingConfig(), seq_length=S, batch_size=4, seed=3)
    sequences = made[0]
    assert sequences.sequences == 5
    sequences.reference_P2 = np.arange(10, dtype=np.float32).reshape(5, 2)
    batch = sequences.batch(1)
    assert batch.samples_B.tolist() == np.repeat(batch.samples_B[::2], 2).tolist()
    for part in batch.split(2):
        wanted = [2 * s + n % 2 for n, s in enumerate(part.samples_B.tolist())]
        assert part.reference_B.tolist() == wanted
        again = sequences.read(part.samples_B[::2])
        np.testing.assert_array_equal(part.labels_BS, again.labels_BS)


def test_saved_pairs_are_the_same(jsonl, tokenizer, tmp_path):
    sequences, _, _ = read([jsonl(TEXTS)], tokenizer)
    sequences.reference_P2 = np.array([[-1.5, -2.5]], np.float32)
    path = tmp_path / "pairs.npz"
    sequences.save(path)
    again = PreferenceSequences.load(path, 1, 0)
    assert again.digest == sequences.digest
    assert again.batch(0).reference_B.tolist() == [-1.5, -2.5]
    assert [each.name for each in tmp_path.iterdir() if each.suffix == ".npz"] == ["pairs.npz"]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"damaged pairs: .*pairs\.npz"):
        PreferenceSequences.load(path, 1, 0)


RULE = "a run keeps its pairs"
DAMAGED = {
    "empty": (lambda path, arrays: path.write_bytes(b""), RULE),
    "one array": (lambda path, arrays: np.save(path.open("wb"), arrays["ids"]), RULE),
    "no archive": (lambda path, arrays: path.write_bytes(b"pairs"), RULE),
    "short reference": ({"reference": np.zeros((1, 2), np.float32)}, r"float32 \[2, 2\]"),
    "other labels": ({"labels": np.zeros((2, 2, 1), np.int32)}, r"labels must be int32 \[2, 2, 24"),
    "other type": ({"positions": np.zeros((2, 2, S), np.float64)}, "positions must be int32"),
    "NaN": ({"reference": np.array([[-1, -1], [-1, np.nan]], np.float32)}, "pair 1: .*finite"),
    "no pair": ({"ids": np.zeros((0, 2, S), np.int32)}, "ids are"),
    "negative": ({"ids": np.full((2, 2, S), -3, np.int32)}, "token -3"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pairs_are_refused(name, tmp_path):
    """With the file and the rule."""
    path, (change, rule) = tmp_path / "pairs.npz", DAMAGED[name]
    values = [np.zeros((2, 2, S), np.int32)] * 3
    sequences = PreferenceSequences(*values, 1, 0)
    sequences.reference_P2 = np.full((2, 2), -1, np.float32)
    sequences.save(path)
    PreferenceSequences.load(path, 1, 0)
    with np.load(path) as file:
        arrays = dict(file)
    if isinstance(change, dict):
        np.savez(path, **(arrays | change))
    else:
        change(path, arrays)
    with pytest.raises(DataError, match=rf"damaged pairs: .*pairs\.npz: .*{rule}"):
        PreferenceSequences.load(path, 1, 0)


def test_the_reference_is_a_part_of_the_digest():
    values = [np.zeros((1, 2, S), np.int32)] * 3
    found = set()
    for number in (-1.0, -2.0):
        sequences = PreferenceSequences(*values, 1, 0)
        sequences.reference_P2 = np.full((1, 2), number, np.float32)
        found.add(sequences.digest)
    assert len(found) == 2


BAD = {
    "missing field: .*, line 2: prompt is a string, chosen is a string, rejected is missing": {
        "prompt": "a", "chosen": "b",
    },
    "missing field: .*, line 2: prompt is missing, chosen is a string": {
        "chosen": "b", "rejected": "c",
    },
    "wrong type: .*, line 2: prompt is a string, chosen is a list": {
        "prompt": "a", "chosen": [EBB], "rejected": [FLOOD],
    },
    "no preference: .*, line 2: chosen equals rejected": {
        "prompt": "a", "chosen": "b", "rejected": "b",
    },
    "empty answer: .*, line 2: rejected": {"prompt": "a", "chosen": "b", "rejected": ""},
    "row too long: .*, line 2: rejected: [0-9]+ tokens: at most training.seq_length, 24": {
        "prompt": "a", "chosen": "b", "rejected": "c d " * S,
    },
    "invalid conversation: .*, line 2: chosen, after the prompt: the last message is the user's": {
        "prompt": [USER], "chosen": [EBB, USER], "rejected": [FLOOD],
    },
    "invalid conversation: .*, line 2, rejected": {
        "prompt": [USER], "chosen": [EBB], "rejected": [FLOOD, FLOOD],
    },
    "not JSON: .*, line 2": b"{",
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_lines_are_named(message, jsonl, tokenizer):
    """The file, the line and the rule; or they are left out, and counted."""
    path = jsonl(TEXTS, BAD[message])
    with pytest.raises(DataError, match=message) as caught:
        read([path], tokenizer)
    assert str(path) in str(caught.value)
    assert "data.packing.skip_bad=true" in str(caught.value)
    sequences, errors, skipped = read([path], tokenizer, skip_bad=True)
    assert (sequences.sequences, skipped) == (1, 1)
    [error] = errors.values()
    assert re.search(message, str(error))


def test_no_pair_at_all(jsonl, tokenizer):
    with pytest.raises(DataError, match=r"nothing to learn: .*1 lines skipped"):
        read([jsonl(b"{")], tokenizer, skip_bad=True)
