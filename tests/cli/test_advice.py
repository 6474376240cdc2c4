"""No message advises what does not exist: every flag that the package names is a command's."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import mistral_ms
from mistral_ms.cli import commands
from mistral_ms.cli.app import app
from mistral_ms.launch.options import parse
from mistral_ms.mindformers.run import parser

PACKAGE = Path(mistral_ms.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*(?![\w-]|\.\w)")
OF_OTHERS = {
    "mistral_ms/cli/calibrate.py",
    "mistral_ms/launch/command.py",
    "mistral_ms/ops/cpu/library.py",
    "mistral_ms/parallel/dryrun/standins.py",
    "mistral_ms/parallel/dryrun/symbols.py",
    "mistral_ms/planner/published.py",
}
"""Files that build, or speak of, the command lines of other programs."""


def strings(tree: ast.AST) -> Iterator[str]:
    """All strings of a module but the docstrings."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    skipped = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in skipped
        ):
            yield node.value


def declared(tree: ast.AST) -> set[str]:
    """The flags of an argparse parser that a module makes."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    return {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "add_argument"
        and isinstance(call.args[0], ast.Constant)
    }


@functools.cache
def named() -> dict[str, set[str]]:
    """The flags that each file of the package names, but for those that it declares."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE.parent).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        flags = {flag for text in strings(tree) for flag in FLAG.findall(text)} - declared(tree)
        if flags and name not in OF_OTHERS:
            found[name] = flags
    return found


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The flags of each command."""
    if not app.registered_commands:
        commands.register(app)
    group = typer.main.get_command(app)
    return {
        name: {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)}
        | {"--help"}
        for name, command in group.commands.items()
    }


@pytest.fixture
def launcher(capsys) -> set[str]:
    flags = set()
    for kind in ("train", "generate"):
        with pytest.raises(SystemExit):
            parse(["--help"], kind)
        flags |= set(FLAG.findall(capsys.readouterr().out))
    return flags


def test_every_flag_that_is_named_exists(options, launcher):
    known = launcher.union(*options.values())
    theirs = set(parser()._option_string_actions)
    unknown = {}
    for name, flags in named().items():
        of_file = known | theirs if name.startswith("mistral_ms/mindformers/") else known
        if flags - of_file:
            unknown[name] = flags - of_file
    assert unknown == {}


def test_a_command_names_its_own_flags(options, launcher):
    for command, own in options.items():
        flags = named().get(f"mistral_ms/cli/{command}.py", set())
        assert flags <= own | launcher, command


def test_every_command_that_opens_a_checkpoint_can_be_told_how(options):
    for command in ("convert", "inspect", "generate", "align", "evaluate"):
        assert {"--from", "--follow-links"} <= options[command], command
    for command in ("convert", "generate", "align", "evaluate"):
        assert "--no-verify" in options[command], command


def test_the_collection_sees_what_is_named():
    found = named()
    assert "--from" in found["mistral_ms/checkpoint/detect.py"]
    assert "--follow-links" in found["mistral_ms/checkpoint/files.py"]
    assert "--overwrite" in found["mistral_ms/checkpoint/target.py"]
    assert "--dtype" in found["mistral_ms/checkpoint/plan.py"]
