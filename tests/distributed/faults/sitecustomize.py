"""Lets one rank of a launched training fail at one step: FAULT=rank:step:kind."""

import os
import signal
import time
from pathlib import Path


def _plant(fault: str) -> None:
    from mistral_ms.launch import heartbeat

    rank, step, kind = fault.split(":")
    original = heartbeat.Heartbeat.__call__

    def beat(self, record):
        original(self, record)
        if record.step == int(step):
            Path(os.environ["FAULT_TIME"]).write_text(str(time.time()))
            if kind == "raise":
                raise RuntimeError("planted")
            if kind == "sleep":
                time.sleep(3600)
            os.kill(os.getpid(), getattr(signal, kind))

    if os.environ.get("RANK_ID") == rank and os.environ.get("MS_ROLE") == "MS_WORKER":
        heartbeat.Heartbeat.__call__ = beat


if "FAULT" in os.environ:
    _plant(os.environ["FAULT"])
