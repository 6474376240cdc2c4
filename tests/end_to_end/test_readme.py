"""The Python of the READMEs does what it says."""

import ast
import re
from pathlib import Path

import numpy as np
from support.hf import hf_logits, save_with_tokenizer
from support.models import ragged_batch

from mistral_ms.checkpoint import convert

ROOT = Path(__file__).parents[2]
RELATIVE = 2e-5
"""The promised bound on the logit difference over the largest logit."""


def example(name):
    """The one Python block of a README."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S)
    return block


def test_the_library_example_gives_hugging_faces_logits(tmp_path, monkeypatch):
    pair = save_with_tokenizer(tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    convert(tmp_path / "hf", tmp_path / "mixtral-ms")
    ids, positions = ragged_batch([7, 4], pair.config.vocab_size)
    names = {"ids": ids, "mask": (positions >= 0).astype(int)}
    exec(example("README.md"), names)
    got, want, real = names["logits"].asnumpy(), hf_logits(pair, ids, positions), positions >= 0
    assert isinstance(names["text"], str)
    assert np.abs(got - want)[real].max() <= RELATIVE * np.abs(want[real]).max()


def test_the_chinese_readme_has_the_same_code():
    """Its comments are in Chinese."""
    ours, theirs = map(ast.parse, map(example, ("README.md", "README_CN.md")))
    assert ast.dump(ours) == ast.dump(theirs)
