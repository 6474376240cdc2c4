"""What a rank's process says while it ends."""

import os
import subprocess
import sys

from mistral_ms.launch.heartbeat import DIRECTORY, farewell_path

PROGRAM = """
import atexit, os, sys
atexit.register(lambda: os.write(2, b"threads end"))  # as native code does, after all else
from mistral_ms.launch import end_quietly
end_quietly(3)
print("an error", file=sys.stderr)
"""


def test_it_is_kept_out_of_the_log(tmp_path):
    for variables, said in (({DIRECTORY: str(tmp_path)}, ""), ({}, "threads end")):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env={**os.environ, **variables}, text=True,
            capture_output=True, check=True,
        )  # fmt: skip
        assert done.stderr == f"an error\n{said}"
    assert farewell_path(tmp_path, 3).read_text() == "threads end"
