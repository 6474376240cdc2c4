"""Measures this machine for ``plan --calibrate``: products, memory, attention, messages.

Every process measures at the same time as all others, as in a training on so many processes: on a
machine with fewer cores than processes each gets a part. Rates are those of one process.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LENGTHS = (8, 32, 128, 512)
"""Shortest axes of the products that are measured."""
LONG = 1024
"""Their other axes."""
MESSAGES = (1 << 13, 1 << 22)
"""Bytes of the tensors that are reduced: short for the latency, long for the bandwidth."""
STREAMS = (1 << 25, 1 << 20)
"""Bytes of the tensors that are added: beyond all caches, and as operators of a step have them."""
CHAIN = 8
"""Additions that follow each other."""
SECONDS, REPEATED = 0.4, 20
"""How long an operation is repeated; how often an exchange is."""
FLOAT = 4
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
        measured: ``products`` FLOP/s for each of ``LENGTHS``; ``stream`` and ``operator`` bytes/s
            of long and of short tensors; ``attention`` forward and gradient FLOP/s; ``messages``
            seconds of an AllReduce of each of ``MESSAGES``, if there are several processes.
        processes: that measured at the same time.
    """
    peak, stream = max(measured["products"]), measured["stream"]
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
        "memory_efficiency": round(min(1.0, measured["operator"] / stream), 4),
    }
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
    one = "one process sends nothing"
    for level in ("inside", "between"):
        sources |= {f"{level}.{key}": text if processes > 1 else one for key in network}
        sources[f"{level}.efficiency"] = "included in gb_per_s"
        del sources[f"{level}.topology"]
    sources |= {f"host.{key}": text for key in ("gb_per_s", "memory_gb_per_s")}
    return {**values, "sources": sources}


def measure(processes: int) -> dict[str, Any]:
    """One process's part: rates of operations as a training has them, in float32.

    Args:
        processes: in all; MindSpore knows its own number.
    """
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, ops

    from mistral_ms.config.layout import Sizes
    from mistral_ms.ops import reference
    from mistral_ms.parallel.collectives import Groups
    from mistral_ms.parallel.topology import GroupKind, Topology

    if ms.get_context("device_target") != "CPU":
        ms.set_device("CPU")
    rank, everyone = 0, None
    if processes > 1:
        from mindspore.communication import get_rank, init

        init()
        rank = get_rank()
        topology = Topology(Sizes(processes, 1, 1, 1), processes)
        everyone = Groups(topology, rank).of(GroupKind.WORLD)

    def numbers(*shape: int) -> Tensor:
        return Tensor(np.random.default_rng(0).standard_normal(shape, np.float32))

    def wait() -> None:
        if everyone is not None:
            everyone.all_reduce(numbers(1)).asnumpy()

    def seconds(operation: Callable[..., Any], *inputs: Tensor, times: int | None = None) -> float:
        """Of one execution, the median of repetitions that all processes begin together.

        What exchanges must be repeated equally often everywhere: ``times``.
        """

        def once() -> float:
            begun = time.perf_counter()
            operation(*inputs)
            ms.runtime.synchronize()
            return time.perf_counter() - begun

        once()
        wait()
        if times is None:
            times = max(3, min(200, math.ceil(SECONDS / max(once(), 1e-6))))
        return statistics.median(once() for _ in range(times))

    wide = numbers(LONG, LONG)
    products = []
    for length in LENGTHS:
        narrow, short = numbers(LONG, length), numbers(length, LONG)
        # the shortest axis is once the inner one and once an outer one
        inner = seconds(ops.matmul, narrow, short)
        outer = seconds(ops.matmul, short, wide)
        products.append(2.0 * LONG * LONG * length / ((inner + outer) / 2))

    def chain(x: Tensor, y: Tensor) -> Tensor:
        for _ in range(CHAIN):
            x = ops.add(x, y)
        return x

    added = ms.jit(chain)  # as in a step, which is compiled: no Python between operators
    rates = []
    for nbytes in STREAMS:
        x = numbers(nbytes // FLOAT)
        rates.append(3 * nbytes * CHAIN / seconds(added, x, x))
    found: dict[str, Any] = {"products": products, "stream": rates[0], "operator": rates[1]}
    B, S, N, G, D = 2, 256, 8, 2, 64
    q, k = numbers(B, S, N, D), numbers(B, G, S, D)
    visible = Tensor(np.tril(np.ones((1, 1, S, S), bool)).repeat(B, 0))

    def mixed(q: Tensor, k: Tensor) -> Tensor:
        return reference.attention(q, k, k, visible)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return mixed(q, k).sum()

    forward, gradient = ms.jit(mixed), ms.jit(ms.grad(loss, (0, 1)))
    ahead = seconds(forward, q, k)
    both = seconds(gradient, q, k)
    operations = 4.0 * B * S * S / 2 * N * D  # of half of the keys, as plans count them
    back = max(both - ahead, ahead / 2)
    found["attention"] = [operations / ahead, 2.5 * operations / back]
    if everyone is not None:
        found["messages"] = [
            seconds(everyone.all_reduce, numbers(nbytes // FLOAT), times=REPEATED)
            for nbytes in MESSAGES
        ]
    return found


def main(directory: str, processes: int) -> None:
    """Measures, and writes what was found for the process that waits for it."""
    found = measure(processes)
    number = os.environ.get("RANK_ID", "0")
    (Path(directory) / f"rank_{number}.json").write_text(json.dumps(found))
