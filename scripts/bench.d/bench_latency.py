"""Part ``latency``: management with one volume and with a thousand, and the memory of an attached one."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bench_figures import MIB, Table, median_ratio, spread
from bench_hosts import Ebsd, fill
from bench_run import Outcome, Run, say

MANY = 1000
SIZE = 1 << 30
LARGE = 1 << 40
OPERATIONS = ("create", "attach", "snapshot", "list", "detach", "delete")


def run(run: Run) -> Outcome:
    repeats = run.rounds * (2 if run.quick else 4)
    took: dict[str, dict[str, list[float]]] = {}
    with run.ebsd("ebsd-latency") as ebsd:
        say("one volume")
        ebsd.create("first", SIZE)
        took["1 volume"] = _all(ebsd, "few", repeats)
        say(f"making {MANY} volumes")
        for number in range(MANY - 1):
            ebsd.client.ec2("CreateVolume", Name=f"v{number}", SizeBytes=SIZE, Encrypted=True)
        say(f"{MANY} volumes")
        took[f"{MANY} volumes"] = _all(ebsd, "many", repeats)
        written = (1 if run.quick else 10) << 30
        say(f"1 TiB with {written >> 30} GiB written")
        ebsd.create("large", LARGE)
        device = ebsd.attach("large")
        empty = device.memory()
        fill(device, written)
        memory = device.memory()
        snapshot = _milliseconds(lambda: ebsd.client.ec2("CreateSnapshot", VolumeId="large"))
        detach = _milliseconds(lambda: ebsd.ctl("detach", "large"))
        attach = _milliseconds(lambda: ebsd.ctl("attach", "large"))
    names = list(took)
    table = Table("Milliseconds of an operation", ["", *names, "ratio"])
    for operation in OPERATIONS:
        few, many = (took[name][operation] for name in names)
        table.add(operation, spread(few).text(1), spread(many).text(1), f"{median_ratio(many, few):.2f}")
    table.notes.append(f"Volumes of {SIZE >> 30} GiB, over the socket; attach and detach with the start of ebsctl.")
    large = Table(f"An attached volume of 1 TiB, {written >> 30} GiB of it written", ["", "unit", ""])
    large.add("memory of its processes (PSS), nothing written", "MiB", f"{empty / MIB:.0f}")
    large.add("memory of its processes (PSS)", "MiB", f"{memory / MIB:.0f}")
    large.add("its processes", "", str(len(device.pids)))
    for name, value in (("CreateSnapshot", snapshot), ("ebsctl detach", detach), ("ebsctl attach", attach)):
        large.add(name, "ms", f"{value:.0f}")
    figures: dict[str, Any] = {"ms": took, "empty": empty, "memory": memory, "written": written}
    return Outcome([table, large], figures | {"large_ms": {"snapshot": snapshot, "detach": detach, "attach": attach}})


def _all(ebsd: Ebsd, label: str, repeats: int) -> dict[str, list[float]]:
    """Create, attach, snapshot, list, detach and delete a volume, again and again."""
    took: dict[str, list[float]] = {operation: [] for operation in OPERATIONS}
    client = ebsd.client
    for at in range(repeats):
        name, snapshot = f"{label}-{at}", f"of-{label}-{at}"
        calls: dict[str, Callable[[], Any]] = {
            "create": partial(client.ec2, "CreateVolume", Name=name, SizeBytes=SIZE, Encrypted=True),
            "attach": partial(ebsd.ctl, "attach", name),
            "snapshot": partial(client.ec2, "CreateSnapshot", VolumeId=name, Name=snapshot),
            "list": partial(client.ec2, "DescribeVolumes"),
            "detach": partial(ebsd.ctl, "detach", name),
            "delete": partial(client.ec2, "DeleteVolume", VolumeId=name),
        }
        for operation in OPERATIONS:
            took[operation].append(_milliseconds(calls[operation]))
    return took


def _milliseconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000
