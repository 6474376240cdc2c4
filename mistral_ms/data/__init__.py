"""Files that are packaged with the code."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

DEMO_TEXT = _HERE / "demo.txt"
"""The text that the demo learns: 16 KB of English prose, written for it, and frozen."""

LEDGER_TEXT = _HERE / "ledger.txt"
"""A text of another kind, for presets that learn two domains: 8 KB of a ledger, drawn by a rule."""

TOKENIZER_CONFIG = _HERE / "tokenizer_config.json"
"""What transformers must be told about a bare ``tokenizer.model`` (see the tokenizer package)."""

_INSTALLED = _HERE.parent / "configs"
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _HERE.parents[1] / "configs"
"""The configurations that come with the package: in a clone the directory ``configs``, of which a
wheel holds a copy."""


def demo_text() -> str:
    """The demo's text."""
    return DEMO_TEXT.read_text(encoding="utf-8")
