"""What pages say of files, links, commands and each other is true."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from support.hf import save_with_tokenizer

from mistral_ms.cli import commands
from mistral_ms.config import load_run_config, when_unknown
from mistral_ms.launch.options import parse
from mistral_ms.shipped import import_shipped

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "ascend_kernels" / "README.md"]
)
TRANSLATED = [page for page in PAGES if page.stem.endswith("_CN")]
RUN_FILE = "configs/run/pretrain_mixtral_tiny_200ep.yaml"
"""Stands for a reader's own, which the pages call F or my_run.yaml."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def name(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """A page without its code."""
    return FENCE.sub("", page.read_text())


def anchors(page):
    """Of a page's headings, as GitHub, Gitee and MkDocs form them."""
    titles = re.findall(r"^#+ +(.*)$", prose(page), re.M)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists() and found.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_in_the_navigation():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [
            f for value in entry for f in files(value if isinstance(entry, list) else entry[value])
        ]

    # what else the file says is read by MkDocs below
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(files(nav)) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.slow
def test_the_site_can_be_built(tmp_path):
    """With MkDocs' own strict checks, and every name of the interface found in the sources.

    No --quiet: it drops the warnings before the strict mode counts them.
    """
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("MkDocs is not installed (make install does, of the extra docs)")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", tmp_path / "site"],
        cwd=ROOT, check=True,
    )  # fmt: skip
    api = (tmp_path / "site" / "api.html").read_text()
    [names] = [
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "mistral_ms" / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    ]
    for public in names:
        assert public.startswith("__") or f'id="mistral_ms.auto.{public}"' in api


def command_lines(page):
    """Every command of a page's shell blocks, as words."""
    for language, block in FENCE.findall(page.read_text()):
        if language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words


LINES = [
    pytest.param(words, id=" ".join(words)[:60])
    for page in PAGES
    if page not in TRANSLATED  # whose code is that of their originals, see below
    for words in command_lines(page)
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """With what earlier commands of the pages leave behind: the demo's model."""
    root = tmp_path_factory.mktemp("reader")
    save_with_tokenizer(root / "demo" / "hf")
    return root


@pytest.mark.parametrize("words", LINES)
def test_a_command_is_one_that_exists(words, directory, monkeypatch):
    """Its flags and arguments are known, its run file is there, and takes what is overridden."""
    monkeypatch.chdir(directory)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words[1:] if words[0] == "bash" else words
    if program in ("pip", "source"):
        return
    if program == "make":
        targets = {w for w in rest if "=" not in w}
        assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    elif Path(program).name in ("python", "python3") and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1])
    elif Path(program).name == "python" and rest[0] == "run_mixtral.py":
        check_command(rest[1:])
    elif program == "mistral-ms":
        check_command(rest)
    elif Path(program).name == "python":
        assert (ROOT / rest[0]).is_file()
    else:
        assert (ROOT / program).is_file() and program.startswith("scripts/")
        check_script(program, rest)


def check_command(words):
    app = typer.Typer()
    commands.register(app)
    command = typer.main.get_command(app).commands[words[0]]
    found = command.make_context(words[0], list(words[1:])).params
    config = found.get("config")
    if words[0] == "train" and config:
        when_unknown(import_shipped)
        overrides = found.get("overrides") or ()
        load_run_config(ROOT / (RUN_FILE if len(config.parts) == 1 else config), overrides)


def check_script(program, words):
    if program == "scripts/msrun_generate.sh":
        options = parse(words, "generate")
        check_command([("generate", "align")["--align" in words], *options.task.arguments])
    elif program != "scripts/msrun_launcher.sh":  # whose arguments are MindFormers'
        if program == "scripts/msrun_train.sh":
            options = parse(words, "train")
        else:
            [line] = re.findall(r"start_run.sh\" (.*) \"\$@\"", (ROOT / program).read_text())
            name, *flags = shlex.split(line)
            flags = [w for w in flags if w.startswith("-") or "=" not in w]
            options = parse(["--config", f"configs/run/{name}.yaml", *flags, *words], "train")
        config = ["--config", str(options.task.config)] if options.task.config else []
        check_command(["train", *config, *options.task.arguments])


@pytest.mark.parametrize("page", TRANSLATED, ids=name)
def test_a_translation_is_at_the_state_of_its_original(page):
    """The same headings in number and level, the same rows of tables and measurements in them, the
    same code but for comments.
    """
    original = page.with_name(page.name.replace("_CN", ""))
    for shape in (heading_levels, table_rows, table_numbers, code):
        assert shape(page) == shape(original)


def heading_levels(page):
    return [len(marks) for marks in re.findall(r"^(#+) ", prose(page), re.M)]


def table_rows(page):
    """Lengths of a page's tables, and the columns of each."""
    tables = re.findall(r"(?:^\|.*\n)+", prose(page), re.M)
    return [(t.count("\n"), len(re.split(r"(?<!\\)\|", t.splitlines()[0]))) for t in tables]


def table_numbers(page):
    """Of cells that have nothing else: a translation must not keep old measurements."""
    rows = re.findall(r"^\|(.*)\|$", prose(page), re.M)
    cells = [cell for row in rows for cell in re.split(r"(?<!\\)\|", row)]
    return [re.findall(r"\d+(?:\.\d+)?", cell) for cell in cells if not re.search(r"[^\W\d]", cell)]


def code(page):
    found = FENCE.findall(page.read_text())
    return [(kind, re.sub(r" *#.*", "", re.sub(r'"[^"]*"', '""', text))) for kind, text in found]
