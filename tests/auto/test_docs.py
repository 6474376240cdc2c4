"""Every Python block of docs/python.md, one after the other, as a reader would type them."""

import re
from pathlib import Path

import pytest
from support.hf import save_with_tokenizer

from mistral_ms.checkpoint import convert, detect

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch, capsys):
    save_with_tokenizer(tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    convert(tmp_path / "hf", tmp_path / "mixtral-ms")
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        exec(block, names)
    assert detect(Path("tide-hf")) == "hf"
    assert names["result"].summary.finished
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-2:]] == ["2", "4"]
    assert names["logits"].shape == names["out"].logits.shape
