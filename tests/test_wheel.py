"""What pip installs works without the repository."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOOK = """
import mistral_ms, sys
from pathlib import Path
from mistral_ms.cli.demo import load_demo_run
from mistral_ms.config import load_run_config
from mistral_ms.data import CONFIGS
from mistral_ms.planner import load_hardware

assert Path(mistral_ms.__file__).is_relative_to(sys.argv[1]), mistral_ms.__file__
assert load_demo_run().training.max_steps > 1
assert load_hardware("atlas_800t_a2").devices_per_node == 8
run = load_run_config(CONFIGS / "run" / "pretrain_mixtral_tiny_200ep.yaml")
assert all(path.is_file() for path in run.data.inputs), run.data.inputs
print(len(list(CONFIGS.rglob("*.yaml"))))
"""


@pytest.mark.slow
def test_the_wheel_has_all_that_it_needs(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, copy(tmp_path)], check=True)
    [wheel] = tmp_path.glob("mistral_ms-*.whl")
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(target)
    assert {"mistral_ms/data/demo.txt", "mistral_ms/configs/run/demo.yaml"} <= names
    assert {"mistral_ms/py.typed", "mistral_ms/serving/page.html"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    found = subprocess.run(
        [sys.executable, "-c", LOOK, target], cwd=tmp_path, env={"PYTHONPATH": str(target)},
        text=True, capture_output=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) == len(list((ROOT / "configs").rglob("*.yaml")))


def copy(tmp_path):
    """The sources; setuptools builds in their directory."""
    target = tmp_path / "sources"
    kept = ("mistral_ms", "configs", "ascend_kernels", "setup.py", "pyproject.toml", "README.md",
            "LICENSE", "MANIFEST.in")  # fmt: skip
    target.mkdir()
    for name in kept:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    return target
