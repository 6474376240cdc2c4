"""Measures this machine for ``plan --calibrate``, and writes what was found as a file of hardware.

Every process measures at the same time as all others, as in a training on so many processes: on a
machine with fewer cores than processes each gets a part. Rates are those of one process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LENGTHS = (8, 32, 128, 512)
"""Shortest axes of the products that are measured."""
MESSAGES = (1 << 13, 1 << 22)
"""Bytes of the tensors that are reduced: short for the latency, long for the bandwidth."""
LIMIT = 300.0
"""Seconds that all processes have."""


def calibrate(processes: int, port: int = 8441) -> dict[str, Any]:
    """Measures with so many processes.

    Args:
        processes: that a training shall have.
        port: of the scheduler, if there are several.

    Returns:
        A file of hardware: see :class:`mistral_ms.planner.Hardware`.

    Raises:
        ConfigError: the processes did not come to an end.
    """
    from mistral_ms.errors import ConfigError

    with tempfile.TemporaryDirectory() as directory:
        # a script of its own: beside this file are modules with names of the standard library
        script = Path(directory) / "measure_part.py"
        script.write_text(
            f"from mistral_ms.cli.calibrate import main\nmain(r'{directory}', {processes})\n"
        )
        worker = [str(script)]
        command = [sys.executable, *worker]
        if processes > 1:  # which starts Python by itself
            msrun = str(Path(sys.executable).parent / "msrun")
            command = [
                msrun, f"--worker_num={processes}", f"--local_worker_num={processes}",
                f"--master_port={port}", f"--log_dir={directory}/logs", "--join=True", *worker,
            ]  # fmt: skip
        environment = {**os.environ, "GLOG_v": "3"}
        home = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = f"{home}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        found = [json.loads(path.read_text()) for path in Path(directory).glob("rank_*.json")]
        logs = [path.read_text(errors="replace") for path in Path(directory).glob("logs/worker_*")]
    if len(found) != processes:
        raise ConfigError(
            "not measured",
            where="--calibrate",
            value=f"{len(found)} of {processes} processes",
            rule=_last_line(*logs, done.stdout, done.stderr),
        )
    return hardware_of({key: _middle([each[key] for each in found]) for key in found[0]}, processes)


def _last_line(*texts: str) -> str:
    """Of the first text that names an error."""
    for text in texts:
        lines = [line.strip() for line in text.splitlines() if "Error" in line]
        if lines:
            return lines[-1][-300:]
    return "all measure to the end"


def _middle(values: list[Any]) -> Any:
    """The mean over processes; of lists the mean at each place."""
    if isinstance(values[0], list):
        return [statistics.fmean(each) for each in zip(*values, strict=True)]
    return statistics.fmean(values)


def hardware_of(measured: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """A file of hardware from what was measured.

    Args:
        measured: ``products`` FLOP/s for each of ``LENGTHS``; ``attention`` forward and gradient
            FLOP/s; ``stream`` bytes/s of passes through whole weights, ``beside`` those of other
            operators; and of several processes ``messages``, seconds of an AllReduce of each of
            ``MESSAGES``, and ``alone``, how many times as fast a process is while others wait.
        processes: that measured at the same time.
    """
    peak = max(measured["products"])
    stream = max(measured["stream"], measured["beside"])
    curve, share = [], 0.0
    for length, rate in zip(LENGTHS, measured["products"], strict=True):
        share = max(share, rate / peak)  # what is wider is not slower, whatever the clock says
        curve.append([length, round(share, 4)])
    latency, bandwidth = 1e-5, stream
    if processes > 1:
        short, long = measured["messages"]
        times = 2 * (processes - 1)
        slope = max(long - short, 1e-9) / (MESSAGES[1] - MESSAGES[0])
        bandwidth = times / processes / slope
        latency = max(short - MESSAGES[0] * slope, 0.0) / times
    forward, backward = measured["attention"]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    network = {
        "topology": "switch",
        "gb_per_s": round(bandwidth / 1e9, 6),
        "efficiency": 1.0,
        "latency_us": round(latency * 1e6, 3),
    }
    text = f"measured with {processes} processes at the same time"
    compute = {
        "peak_tflops": dict.fromkeys(("bfloat16", "float16", "float32"), round(peak / 1e12, 6)),
        "efficiency": curve,
        "attention_forward": round(min(1.0, forward / peak), 4),
        "attention_backward": round(min(1.0, backward / peak), 4),
        "memory_gb_per_s": round(stream / 1e9, 4),
        "memory_efficiency": round(measured["beside"] / stream, 4),
        "slowdown": 1.0,
        "stream_efficiency": round(measured["stream"] / stream, 4),
    }
    if processes > 1:
        compute["alone"] = round(max(1.0, measured["alone"]), 4)
    host = {
        "gb_per_s": compute["memory_gb_per_s"],
        "memory_gb_per_s": compute["memory_gb_per_s"],
        "memory_gib": round(gib, 1),
    }
    values: dict[str, Any] = {
        "name": f"this machine, {processes} processes",
        "device": "CPU",
        "devices_per_node": processes,
        "memory_gib": round(gib / processes, 2),
        "reserved_gib": round(min(1.0, gib / processes / 4), 2),
        "communicator_mib": 0,
        "compute": compute,
        "inside": network,
        "between": network,
        "host": host,
    }
    sources = {
        key: "what the operating system says"
        for key in ("devices_per_node", "memory_gib", "host.memory_gib")
    }
    sources |= dict.fromkeys(("reserved_gib", "communicator_mib"), "assumed")
    sources |= {f"compute.{key}": text for key in compute}
    sources["compute.peak_tflops"] = f"{text}, in float32; other dtypes are taken for as fast"
    sources["compute.slowdown"] = "operators are measured as a step has them"
    one = "one process sends nothing"
    for level in ("inside", "between"):
        sources |= {f"{level}.{key}": text if processes > 1 else one for key in network}
        sources[f"{level}.efficiency"] = "included in gb_per_s"
        del sources[f"{level}.topology"]
    sources |= {f"host.{key}": text for key in ("gb_per_s", "memory_gb_per_s")}
    return {**values, "sources": sources}


def main(directory: str, processes: int) -> None:
    """Measures, and writes what was found for the process that waits for it."""
    from mistral_ms.cli.calibrate_operators import measure

    found = measure(processes)
    number = os.environ.get("RANK_ID", "0")
    (Path(directory) / f"rank_{number}.json").write_text(json.dumps(found))
