"""The import table of the house, enforced by reading the sources.

Imports inside functions count as much as those at the top: a package that must not know another one
must not know it lazily either. What is heavy may only be imported lazily.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import mistral_ms

PACKAGE = Path(mistral_ms.__file__).parent
HEAVY = {"torch", "transformers", "matplotlib", "mindformers", "peft"}
"""Never at the top of a module: installed only by some users, or slow to import."""
LINE_LIMIT = 400


@dataclass(frozen=True)
class Rule:
    """What a package may import besides itself, ``errors``, ``reading`` and the standard library.

    Attributes:
        ours: other packages, or single modules of them.
        packages: third-party packages.
        mindspore_only_in: the modules that may import mindspore; None = all, where it is allowed.
        mindspore_not_in: the modules that may not, with everything inside them; a package's own
            name stands for its ``__init__`` alone.
    """

    ours: frozenset[str] = frozenset()
    packages: frozenset[str] = frozenset()
    mindspore_only_in: frozenset[str] | None = None
    mindspore_not_in: frozenset[str] = frozenset()


def rule(ours: str = "", packages: str = "", **modules: str) -> Rule:
    split = {key: frozenset(names.split()) for key, names in modules.items()}
    return Rule(frozenset(ours.split()), frozenset(packages.split()), **split)


MODEL_PACKAGES = "config weights ops layers moe models"
BELOW_TRAINING = f"{MODEL_PACKAGES} optimizers staging parallel tokenizer checkpoint data datasets"
# numpy goes where mindspore goes: its tensors are made of arrays
TABLE = {
    "errors": rule(),
    "cache": rule(),
    "enums": rule(),
    "reading": rule(),
    "recognition": rule(),
    "signals": rule(),
    "__init__": rule("auto"),
    "data": rule(),
    "staging": rule(),
    "config": rule(packages="pydantic yaml"),
    "weights": rule("config", "numpy"),  # initial values
    "ops": rule(packages="mindspore numpy"),
    "layers": rule("config weights ops", "mindspore numpy"),
    "moe": rule("config weights ops layers", "mindspore numpy pydantic"),  # gates have settings
    "models": rule("config weights layers moe", "mindspore numpy"),
    "optimizers": rule("config weights ops", "mindspore numpy pydantic"),
    "parallel": rule(
        f"{MODEL_PACKAGES} optimizers",
        "mindspore numpy matplotlib",
        mindspore_not_in=(
            "mistral_ms.parallel mistral_ms.parallel.topology mistral_ms.parallel.pipeline "
            "mistral_ms.parallel.memory"
        ),
    ),
    "tokenizer": rule("config data", "sentencepiece tokenizers mistral_common jinja2"),
    "checkpoint": rule(
        "config weights staging parallel.topology",
        "numpy safetensors torch mindspore",
        mindspore_only_in=(
            "mistral_ms.checkpoint.load mistral_ms.checkpoint.save "
            "mistral_ms.checkpoint.merge_ranks"
        ),
    ),
    "datasets": rule(
        "config staging tokenizer",
        "numpy mindspore",
        mindspore_only_in="mistral_ms.datasets.mindrecord",
    ),
    "training": rule(BELOW_TRAINING, "mindspore numpy rich matplotlib tensorboardX yaml"),
    "inference": rule(BELOW_TRAINING, "mindspore numpy"),
    "serving": rule(
        f"{BELOW_TRAINING} inference", "pydantic fastapi starlette uvicorn prometheus_client"
    ),
    "auto": rule(f"{BELOW_TRAINING} training inference shipped", "mindspore numpy pydantic"),
    "mixtures": rule(f"{MODEL_PACKAGES} checkpoint", "mindspore numpy pydantic"),
    "alignment": rule(f"{BELOW_TRAINING} inference", "mindspore numpy torch transformers peft"),
    "shipped": rule("moe mixtures parallel"),
    "launch": rule("config weights checkpoint datasets parallel.pipeline training shipped"),
    "planner": rule(
        "config data weights parallel.topology parallel.pipeline parallel.memory parallel.sharding "
        "parallel.dryrun.cost parallel.dryrun.ir parallel.dryrun.peak parallel.dryrun.report",
        "pydantic matplotlib",  # files of hardware, pictures
    ),
    "mindformers": rule(f"{BELOW_TRAINING} training inference", "mindspore numpy mindformers yaml"),
    "cli": rule(
        f"{BELOW_TRAINING} training inference serving mixtures alignment planner launch shipped",
        "typer rich mindspore numpy matplotlib",
    ),
}
IMPORTS_ALL = {"mistral_ms.config.extensions"}
"""Imports every file of the package that asks, so that one more file is all that is added."""
COMMON = {"errors", "cache", "enums", "reading", "recognition", "signals", "__version__"}
"""Every package may import them: what users meet, where compiled files are kept, how files of
others are read and recognised, how to be ended."""


@dataclass(frozen=True)
class Import:
    """One imported module, and whether importing this file imports it."""

    name: str
    line: int
    at_top: bool


def imports(path: Path, module: str) -> Iterator[Import]:
    """Every import of a file, wherever it stands, ``importlib.import_module("x")`` included."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    yield from _imports(tree, package, at_top=True)


def _imports(node: ast.AST, package: str, at_top: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, at_top) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        base = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
        origin = ".".join(filter(None, (base, node.module)))
        # `from mistral_ms import cli` imports mistral_ms.cli
        yield from (Import(f"{origin}.{alias.name}", node.lineno, at_top) for alias in node.names)
    elif isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        called = node.func.id if isinstance(node.func, ast.Name) else called
        if called in ("import_module", "__import__") and node.args:
            target = node.args[0]
            known = isinstance(target, ast.Constant) and isinstance(target.value, str)
            yield Import(target.value if known else "?", node.lineno, at_top)
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        at_top = False
    inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, package, at_top and not inside)


def violations(package: Path) -> list[str]:
    """Everything in ``package`` (a directory named mistral_ms) that breaks the table."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package).with_suffix("")
        name = ".".join(["mistral_ms", *relative.parts]).removesuffix(".__init__")
        where = relative.parts[0]
        if where not in TABLE:
            found.append(f"{name}: the package {where} is not in the table")
            continue
        found += [
            f"{name}:{each.line}: {problem}"
            for each in imports(path, name)
            if (problem := _problem(each, name, where))
        ]
    return found


def _problem(imported: Import, module: str, where: str) -> str | None:
    rule, top = TABLE[where], imported.name.partition(".")[0]
    if top == "mistral_ms":
        inner = imported.name.removeprefix("mistral_ms").removeprefix(".")
        target = inner.partition(".")[0]
        if target in (where, *COMMON, ""):
            return None
        if any(f"{inner}.".startswith(f"{allowed}.") for allowed in rule.ours):
            return None
        return f"{where} may not import {imported.name}"
    # typing_extensions: the typing of later versions of Python, for type checkers
    if top in {*sys.stdlib_module_names, "typing_extensions"} or (
        top == "?" and module in IMPORTS_ALL
    ):
        return None
    if top not in rule.packages:
        return f"{where} may not import {imported.name}"
    if top in HEAVY and imported.at_top and (top != where or module == f"mistral_ms.{where}"):
        return f"{top} must be imported where it is used, not at the top"
    if top == "mindspore":
        only = rule.mindspore_only_in
        barred = any(_is_inside(module, name) for name in rule.mindspore_not_in)
        if barred or (only is not None and module not in only):
            return f"{module} may not import mindspore"
    return None


def _is_inside(module: str, name: str) -> bool:
    is_package = name.count(".") == 1
    return module == name or (not is_package and module.startswith(f"{name}."))


def test_the_table_holds():
    assert violations(PACKAGE) == []


def test_the_whole_package_was_read():
    ours = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {"config", "ops", "layers", "moe", "models", "checkpoint", "cli"} <= ours
    assert sum(1 for _ in imports(PACKAGE / "models" / "causal_lm.py", "mistral_ms.models.x")) > 10


PLANTED = {
    "config/a.py": ("import mindspore", "config may not import mindspore"),
    "ops/a.py": ("from mistral_ms.layers import Linear", "ops may not import mistral_ms.layers"),
    "ops/b.py": ("from mistral_ms import config", "ops may not import mistral_ms.config"),
    "ops/c.py": ("from ..config import load", "ops may not import mistral_ms.config.load"),
    "ops/reference/d.py": ("from ... import moe", "ops may not import mistral_ms.moe"),
    "layers/a.py": ("import mistral_ms.moe.layer as x", "layers may not import mistral_ms.moe"),
    "moe/a.py": ("def f():\n    from mistral_ms.parallel import groups", "moe may not import"),
    "models/a.py": ("from mistral_ms.ops import reference", "models may not import mistral_ms.ops"),
    "models/b.py": (
        "import importlib\ndef f():\n    importlib.import_module('mistral_ms.training')",
        "models may not import mistral_ms.training",
    ),
    "models/c.py": ("import importlib\nimportlib.import_module(x)", r"models may not import ?"),
    "tokenizer/a.py": ("def f():\n    import mindspore.ops", "tokenizer may not import mindspore"),
    "checkpoint/a.py": ("from mindspore import Tensor", "checkpoint.a may not import mindspore"),
    "checkpoint/b.py": ("import torch", "torch must be imported where it is used"),
    "checkpoint/c.py": ("from mistral_ms.parallel import groups", "checkpoint may not import"),
    "checkpoint/d.py": ("from mistral_ms.models import CausalLM", "checkpoint may not import"),
    "parallel/topology.py": ("import mindspore", "topology may not import mindspore"),
    "parallel/topology/a.py": ("import mindspore", "topology.a may not import mindspore"),
    "parallel/__init__.py": ("import mindspore", "parallel may not import mindspore"),
    "training/a.py": ("from mistral_ms.inference import engine", "training may not import"),
    "inference/a.py": ("import mistral_ms.alignment", "inference may not import"),
    "alignment/a.py": ("class A:\n    import torch", "torch must be imported where it is used"),
    "alignment/b.py": (
        "try:\n    import transformers\nexcept ImportError: ...",
        "transformers must",
    ),
    "inference/b.py": (
        "from mistral_ms.cli import main",
        "inference may not import mistral_ms.cli",
    ),
    "data/a.py": ("import numpy", "data may not import numpy"),
    "mindformers/__init__.py": ("import mindformers", "mindformers must be imported where it is"),
    "training/b.py": ("from mistral_ms.mindformers import config", "training may not import"),
    "cli/b.py": ("from mistral_ms import mindformers", "cli may not import"),
    "weights/a.py": ("from mistral_ms.layers import Linear", "weights may not import"),
    "weights/b.py": ("import mindspore", "weights may not import mindspore"),
    "basement/a.py": ("", "the package basement is not in the table"),
}
ALLOWED = {
    "checkpoint/load.py": "import mindspore\nfrom mistral_ms.parallel.topology import Layout",
    "checkpoint/e.py": "def f():\n    import torch",
    "alignment/c.py": "def f():\n    import torch\nfrom mistral_ms.inference import Engine",
    "alignment/d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
    "ops/e.py": "import os, mindspore.ops\nfrom mistral_ms.errors import KernelError",
    "ops/reference/f.py": "from . import a\nfrom .. import b\nfrom ...errors import KernelError",
    "cli/a.py": "from mistral_ms.alignment import align\nfrom mistral_ms.cli.app import app",
    "parallel/groups.py": "import mindspore",
    "mindformers/a.py": "from mindformers.wrapper import MFTrainOneStepCell",
}


def plant(root: Path, file: str, source: str) -> Path:
    path = root / "mistral_ms" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    return root / "mistral_ms"


@pytest.mark.parametrize("file", PLANTED)
def test_a_planted_violation_is_found(tmp_path, file):
    source, message = PLANTED[file]
    found = violations(plant(tmp_path, file, source))
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize("file", ALLOWED)
def test_what_is_allowed_passes(tmp_path, file):
    assert violations(plant(tmp_path, file, ALLOWED[file])) == []


def test_nothing_imports_the_command_line():
    assert not any("cli" in rule.ours for rule in TABLE.values())


LIGHT = (
    "config", "weights", "tokenizer", "checkpoint", "data", "datasets", "cli", "launch",
    "parallel.topology", "parallel.pipeline", "parallel.memory", "parallel.sharding", "planner",
)  # fmt: skip
LOADS = f"""
import os, sys
import numpy, pydantic  # are light, and cost most
for name in {LIGHT!r}:
    if os.fork() == 0:
        __import__("mistral_ms." + name)
        print(name, *sorted({HEAVY | {"mindspore"}!r} & set(sys.modules)), flush=True)
        os._exit(0)
    os.wait()
"""


def test_light_rooms_load_nothing_heavy():
    """Not only by their own imports: also by those of what they import. Each in a fork of its own
    of a new interpreter.
    """
    command = [sys.executable, "-c", LOADS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(LIGHT), done.stderr


def environment_reads(path: Path) -> list[int]:
    """Lines that touch the process's environment variables."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.Name) and node.id in names)
        or (isinstance(node, ast.ImportFrom) and any(a.name in names for a in node.names))
    ]


def test_no_environment_variable_decides_what_a_model_computes():
    for where in ("config", "ops", "layers", "moe", "models"):
        for path in (PACKAGE / where).rglob("*.py"):
            assert not environment_reads(path), path


@pytest.mark.parametrize(
    "source", ["import os\nx = os.environ['A']", "from os import getenv\ngetenv('A')"]
)
def test_reading_the_environment_is_found(tmp_path, source):
    (tmp_path / "a.py").write_text(source)
    assert environment_reads(tmp_path / "a.py")


def test_files_stay_small():
    long = {
        str(path.relative_to(PACKAGE)): count
        for path in PACKAGE.rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > LINE_LIMIT
    }
    assert not long, f"more than {LINE_LIMIT} lines"
