"""The Python of the READMEs does what it says."""

import ast
import re
from pathlib import Path

import numpy as np
import transformers
from support.hf import hf_logits, save_with_tokenizer

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
    names = {}
    exec(example("README.md"), names)
    ids = np.asarray(
        transformers.AutoTokenizer.from_pretrained("hf")(["The sparse layer"]).input_ids
    )
    positions = np.arange(ids.shape[1])[None]
    got, want = names["logits"].asnumpy(), hf_logits(pair, ids, positions)
    assert isinstance(names["text"], str)
    assert np.abs(got - want).max() <= RELATIVE * np.abs(want).max()


def test_the_chinese_readme_has_the_same_code():
    """Its comments are in Chinese."""
    ours, theirs = map(ast.parse, map(example, ("README.md", "README_CN.md")))
    assert ast.dump(ours) == ast.dump(theirs)
