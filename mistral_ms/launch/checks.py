"""What can be found out before the first process starts, with one sentence of advice each.

Names of variables and their meaning are those of CANN's and MindSpore's documentation.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_ms.errors import MistralMsError
from mistral_ms.launch.command import SCRIPT
from mistral_ms.launch.options import Options

RANK_TABLES = ("RANK_TABLE_FILE", "MINDSPORE_HCCL_CONFIG_PATH")
SET_BY_MSRUN = ("MS_ROLE", "MS_NODE_ID", "MS_SIMULATION_LEVEL")
CONNECT_SECONDS, EXECUTE_SECONDS = 600, 1800
"""Seconds; ranks of a large job compile, read and save for minutes at different speeds."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        message: what, where, and what to do, in one sentence.
        fatal: the job cannot work; otherwise it is started all the same.
    """

    message: str
    fatal: bool = True


def check_all(options: Options, environ: Mapping[str, str]) -> list[Finding]:
    """Everything that is wrong or doubtful on this machine."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: check_run(options),
        lambda: check_task(options),
        lambda: check_script(environ),
        lambda: check_logs(options.log_dir),
        lambda: check_port(options),
        lambda: check_devices(options, environ),
        lambda: check_rank_tables(environ),
        lambda: check_hccl(options, environ),
    )
    return [finding for check in checks for finding in check()]


def check_run(options: Options) -> Iterator[Finding]:
    """The layout is known and possible, and is for as many processes as are started."""
    try:
        parallel = options.task.parallel()
    except MistralMsError as error:
        yield Finding(str(error))
        return
    sizes = parallel.sizes
    if sizes.world != options.world:
        yield Finding(
            f"the layout of {options.task.title} ({sizes}) is for {sizes.world} processes, but "
            f"--nodes {options.nodes} times --workers {options.workers} are "
            f"{options.world}: change either"
        )
    if (
        options.nodes > 1
        and options.task.knows_machines
        and parallel.devices_per_node != options.workers
    ):
        yield Finding(
            f"parallel.devices_per_node ({parallel.devices_per_node}) is not --workers "
            f"({options.workers}): set it to that, so that groups are laid out as the machines are",
            fatal=parallel.all_to_all != "flat",
        )


def check_task(options: Options) -> Iterator[Finding]:
    """What every process would refuse, after half a minute in which they find each other."""
    try:
        options.task.parallel()
    except MistralMsError:
        return  # check_run has said it
    try:
        options.task.check(options.node_rank)
    except MistralMsError as error:
        yield Finding(str(error))


def check_script(environ: Mapping[str, str]) -> Iterator[Finding]:
    """There are msrun and what it starts there, of the same Python."""
    folders = [Path(folder) for folder in environ.get("PATH", "").split(os.pathsep) if folder]
    first = {
        name: next((f for f in folders if (f / name).is_file()), None)
        for name in ("msrun", "python")
    }
    if first["msrun"] is None:
        yield Finding("msrun is not on the PATH: activate the environment that has MindSpore")
    elif first["python"] != first["msrun"]:
        yield Finding(
            f"msrun is in {first['msrun']}, but it would start {first['python']}/python: put "
            "msrun's directory first on the PATH"
        )
    if not SCRIPT.is_file():
        yield Finding(f"{SCRIPT} is missing: start from a checkout of the repository")


def check_logs(directory: Path) -> Iterator[Finding]:
    """Logs can be written."""
    # a name of one's own: launchers on other machines look at the same directory at the same time
    probe = directory / f".mistral_ms_probe-{socket.gethostname()}-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield Finding(
            f"logs cannot be written to {directory} ({error.strerror}): choose another --log-dir"
        )


def check_port(options: Options) -> Iterator[Finding]:
    """On the master the port is free; elsewhere the master's name is known."""
    if not 1024 <= options.port <= 65535:
        yield Finding(f"port {options.port} is outside 1024 to 65535: choose another --port")
        return
    try:
        found = socket.getaddrinfo(options.master, options.port, type=socket.SOCK_STREAM)
    except OSError as error:
        yield Finding(f"{options.master} has no address ({error.strerror}): correct --master")
        return
    family, _, _, _, address = found[0]
    if options.node_rank > 0:
        return  # the master may be started later: processes wait for it up to --join-limit
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                yield Finding(
                    f"{options.master} is not an address of this machine, which has --node-rank 0: "
                    "give its own address as --master on all machines"
                )
            else:
                yield Finding(
                    f"port {options.port} on {options.master} is taken ({error.strerror}): choose "
                    "another --port on all machines"
                )


def check_devices(options: Options, environ: Mapping[str, str]) -> Iterator[Finding]:
    """There are as many visible devices as processes."""
    visible = environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if visible is None:
        return
    devices = [item.strip() for item in visible.split(",") if item.strip()]
    if len(set(devices)) != len(devices):
        yield Finding(f"ASCEND_RT_VISIBLE_DEVICES={visible} names a device twice: correct it")
    elif len(devices) < options.workers:
        yield Finding(
            f"ASCEND_RT_VISIBLE_DEVICES={visible} shows {len(devices)} devices for --workers "
            f"{options.workers}: show more devices, or start fewer workers"
        )


def check_rank_tables(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Nothing is left of another way of starting."""
    for name in RANK_TABLES:
        if environ.get(name):
            yield Finding(f"{name}={environ[name]} contradicts msrun, which needs none: unset it")
    for name in SET_BY_MSRUN:
        if environ.get(name):
            yield Finding(f"{name}={environ[name]} is msrun's own to set: unset it")


def check_hccl(options: Options, environ: Mapping[str, str]) -> Iterator[Finding]:
    """HCCL's waiting times and interfaces; only advice, for no other machine is asked."""
    for name, least in (
        ("HCCL_CONNECT_TIMEOUT", CONNECT_SECONDS),
        ("HCCL_EXEC_TIMEOUT", EXECUTE_SECONDS),
    ):
        value = environ.get(name)
        if value is None:
            if options.nodes > 1 and name == "HCCL_CONNECT_TIMEOUT":
                yield Finding(
                    f"{name} is not set, and ranks that compile at different speeds may wait "
                    f"longer for each other than its default: export {name}={least}",
                    fatal=False,
                )
        elif not value.isdigit():
            yield Finding(f"{name}={value} is not a number of seconds: correct or unset it")
        elif 0 < int(value) < least:
            yield Finding(
                f"{name}={value} is short for a large job: {least} seconds are safer", fatal=False
            )
    if options.nodes > 1 and not (environ.get("HCCL_SOCKET_IFNAME") or environ.get("HCCL_IF_IP")):
        yield Finding(
            "neither HCCL_SOCKET_IFNAME nor HCCL_IF_IP is set, so HCCL picks an interface itself: "
            "export HCCL_SOCKET_IFNAME with the one that reaches the other machines",
            fatal=False,
        )
