"""Thin entry: the metadata lives in pyproject.toml. Adds ``build_kernels``: see its --help; and
the configurations to what is installed.
"""

import shutil
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithConfigs(build_py):
    """Puts ``configs`` into the package, so that an installed one has them, too."""

    def run(self) -> None:
        """Copies them; run files there find the package's data in another place."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "mistral_ms" / "configs"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(ROOT / "configs", target)
        for path in target.rglob("*.yaml"):
            text = path.read_text(encoding="utf-8")
            moved = text.replace("../../mistral_ms/data/", "../../data/")
            path.write_text(moved, encoding="utf-8")


class BuildKernels(Command):
    """``python setup.py build_kernels --target npu|twin``: as scripts/build_kernels.sh."""

    description = "build the AscendC operators for NPUs, or on their CPU twin"
    user_options: ClassVar = [
        ("target=", None, "npu (needs CANN) or twin (needs g++)"),
        ("soc-version=", None, "npu: ascend910b or ascend910_93; asked of npu-smi when not given"),
        ("cann-path=", None, "npu: CANN's toolkit, where it is unusual"),
        ("install-path=", None, "npu: where to install the package"),
        ("output=", None, "twin: the library to write"),
        ("strict", None, "twin: warnings are errors"),
    ]
    boolean_options: ClassVar = ["strict"]

    def initialize_options(self) -> None:
        """Nothing is given yet."""
        self.target = self.soc_version = self.cann_path = self.install_path = self.output = None
        self.strict = 0

    def finalize_options(self) -> None:
        """The builder checks them."""

    def run(self) -> None:
        """Passes the flags on."""
        sys.path.insert(0, str(ROOT))
        from ascend_kernels.build import main

        names = ("target", "soc_version", "cann_path", "install_path", "output")
        given = {name: getattr(self, name) for name in names}
        flags = [f"--{n.replace('_', '-')}={v}" for n, v in given.items() if v is not None]
        if code := main([*flags, *(["--strict"] if self.strict else [])]):
            sys.exit(code)


setup(cmdclass={"build_kernels": BuildKernels, "build_py": BuildWithConfigs})
