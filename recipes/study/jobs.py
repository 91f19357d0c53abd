"""Commands side by side, over the devices there are."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch


def devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES can be set to; "" alone where there is no GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given:
        return given.split(",")
    return [str(index) for index in range(torch.cuda.device_count())] or [""]


def run_all(
    commands: Sequence[tuple[str, Sequence[str]]], *, logs: Path, each: int, on: Sequence[str]
) -> None:
    """Run named commands, `each` at a time on every device; raise where one fails.

    What they print goes to `logs/NAME.log`. The first failure stops the others.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running = list(commands), {}
    slots = [device for _ in range(each) for device in on]
    started = time.monotonic()
    try:
        while waiting or running:
            while waiting and slots:
                name, command = waiting.pop(0)
                device = slots.pop(0)
                log = (logs / f"{name}.log").open("wb")
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device, "OMP_NUM_THREADS": "2"}
                process = subprocess.Popen(
                    list(command), stdout=log, stderr=subprocess.STDOUT, env=environment
                )
                running[process] = name, device, log
            for process in [p for p in running if p.poll() is not None]:
                name, device, log = running.pop(process)
                log.close()
                slots.append(device)
                print(f"{time.monotonic() - started:.0f} s: {name} done", file=sys.stderr)
                if process.returncode:
                    tail = (logs / f"{name}.log").read_text(errors="replace")[-2000:]
                    raise SystemExit(f"{name} failed ({process.returncode}):\n{tail}")
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
