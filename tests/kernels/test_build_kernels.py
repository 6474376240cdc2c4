"""Building: what is missing is one sentence, and MindSpore's own builder gets what it wants.

CANN is not there when these tests run. A stand-in has the parts that the builder uses: a project
template whose build script packs whatever sources it was given into a package that installs itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels.support.twin import Twin

from ascend_kernels import build, build_npu, build_twin
from mistral_ms.errors import KernelError

ROOT = Path(build.__file__).parents[1]
TEMPLATE = "tools/op_project_templates/ascendc/customize"
PRESETS = """{"configurePresets": [{"cacheVariables": {
    "ASCEND_COMPUTE_UNIT": {"value": ""}, "ASCEND_CANN_PACKAGE_PATH": {"value": ""},
    "vendor_name": {"value": ""}}}]}"""
BUILD_SCRIPT = """
mkdir build_out
cat > build_out/custom_opp.run <<'END'
package=$ASCEND_CUSTOM_OPP_PATH/vendors/mistral_ms
mkdir -p "$package"
cp -r op_host op_kernel CMakePresets.json "$package"
END
sed -i "2i cd $PWD" build_out/custom_opp.run
"""


def run(*command, **environment):
    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)


@pytest.fixture
def no_cann(monkeypatch):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    if Path("/usr/local/Ascend").exists():
        pytest.skip("CANN is installed here: its absence cannot be tested")


@pytest.fixture
def cann(tmp_path, monkeypatch):
    """The stand-in; its scripts run in bash as CANN's do."""
    home = tmp_path / "cann"
    project = home / TEMPLATE
    for folder in ("op_host", "op_kernel"):
        (project / folder).mkdir(parents=True)
        (project / folder / "add_custom.cpp").write_text("// the template's own example")
    (home / "tools/op_project_templates/ascendc/common").mkdir()
    (project / "CMakePresets.json").write_text(PRESETS)
    (project / "build.sh").write_text(BUILD_SCRIPT)
    monkeypatch.setattr(build_npu, "INSTALLED", tmp_path / "lib")
    monkeypatch.setattr(build_npu, "OBJECTS", tmp_path / "objects")
    return home


@pytest.mark.parametrize(
    "command",
    [["scripts/build_kernels.sh"], [sys.executable, "setup.py", "-q", "build_kernels"]],
    ids=["script", "setup.py"],
)
def test_without_cann_one_sentence_says_what_is_missing(no_cann, command):
    done = run(*command, "--target", "npu")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: CANN is missing: /usr/local/Ascend/")
    assert lines[0].endswith("or name it by --cann-path")


def test_without_a_compiler_one_sentence_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.main(["--target", "twin", "--output", str(tmp_path / "x.so")]) == 2
    assert capsys.readouterr().err == (
        "error: no C++ compiler: PATH: g++: the CPU twin is compiled with g++ 9 or newer: "
        "install it, for example: apt install g++\n"
    )


def test_a_source_that_does_not_compile_is_named(tmp_path, compiles):
    source = tmp_path / "wrong.cpp"
    source.write_text("int main() { return nobody; }")
    with pytest.raises(KernelError, match=r"compilation failed: .*wrong.cpp: (.|\n)*nobody"):
        build_twin.build_twin(tmp_path / "x.so", [build_twin.Unit(source)])


def test_help_and_unknown_targets():
    done = run("scripts/build_kernels.sh", "--help")
    assert done.returncode == 0
    assert "--soc-version" in done.stdout
    assert run("scripts/build_kernels.sh", "--target", "gpu").returncode == 2
    assert run("scripts/build_kernels.sh").returncode == 2


def test_the_script_builds_the_twin(tmp_path, custom_kernels):
    library = tmp_path / "made" / "twin.so"
    done = run("scripts/build_kernels.sh", "--target", "twin", "--strict", "--output", library)
    assert (done.returncode, done.stdout) == (0, f"built {library}\n"), done.stderr
    twin = Twin(library)
    for name in build_twin.operators():
        assert twin.describe(name).socs == build_npu.SOCS
    again = run(sys.executable, "setup.py", "-q", "build_kernels", "--target=twin", "--strict",
                f"--output={library}")  # fmt: skip
    assert again.returncode == 0, again.stderr


def test_mindspores_builder_takes_our_sources(cann, tmp_path):
    """The real builder of the MindSpore wheel, up to where CANN's compiler would start."""
    package = build_npu.build_npu(soc_version="ascend910b", cann=cann)
    assert package == tmp_path / "objects/opp/vendors/mistral_ms"
    for folder in ("op_host", "op_kernel"):
        ours = {path.name for path in (ROOT / "ascend_kernels" / folder).iterdir()}
        assert {path.name for path in (package / folder).iterdir()} == ours
    presets = (package / "CMakePresets.json").read_text()
    assert '"ascend910b"' in presets
    assert '"mistral_ms"' in presets
    assert (tmp_path / "lib" / "opp_path.txt").read_text() == f"{package}\n"


def test_sources_lie_flat():
    """The builder copies no folders."""
    for folder in ("op_host", "op_kernel"):
        paths = list((ROOT / "ascend_kernels" / folder).iterdir())
        assert paths
        assert all(path.is_file() and path.suffix in (".cpp", ".h") for path in paths)


def test_a_build_that_fails_shows_where_to_look(cann):
    (cann / TEMPLATE / "build.sh").write_text("echo no compiler; exit 1")
    with pytest.raises(KernelError, match=r"the build for NPUs failed: .*npu: see build.log"):
        build_npu.build_npu(soc_version="ascend910b", cann=cann)


def test_a_runtime_without_the_toolkit_is_refused(tmp_path):
    with pytest.raises(KernelError, match=r"CANN cannot build operators: .*only the runtime"):
        build_npu.find_cann(tmp_path)


def test_the_environment_of_cann_is_used(cann, monkeypatch):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(cann))
    assert build_npu.find_cann() == cann


@pytest.mark.parametrize(
    ("listing", "soc"),
    [
        ("| 0     910B3               | OK            | 93.5        41 |", "ascend910b"),
        ("| 0     910_9391            | OK            | 93.5        41 |", "ascend910_93"),
    ],
)
def test_the_chip_is_asked_of_npu_smi(listing, soc, tmp_path, monkeypatch):
    tool = tmp_path / "npu-smi"
    tool.write_text(f"#!/bin/sh\necho '{listing}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert build_npu.detect_soc() == soc


def test_an_unknown_chip_asks_for_the_flag(monkeypatch, tmp_path, cann):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match="npu-smi is not in PATH: give --soc-version ascend910b"):
        build_npu.detect_soc()
    monkeypatch.undo()
    with pytest.raises(KernelError, match="unsupported chip: --soc-version: ascend310p: one of"):
        build_npu.build_npu(soc_version="ascend310p", cann=cann)
