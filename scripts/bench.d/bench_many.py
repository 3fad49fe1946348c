"""Part ``many``: eight attached volumes together against one of them alone."""

from __future__ import annotations

from typing import Any

from bench_arena import ROWS, rate
from bench_figures import MIB, Table, median_ratio, spread
from bench_hosts import Device, Row, fill, run_fio_on, sync
from bench_run import Outcome, Run, say

VOLUMES = 8


def run(run: Run) -> Outcome:
    size = max(MIB, run.size // VOLUMES // MIB * MIB)
    found: dict[str, dict[str, list[float]]] = {row.name: {"one": [], "all": []} for row in ROWS}
    with run.ebsd("ebsd-many") as ebsd:
        devices = []
        for number in range(VOLUMES):
            ebsd.create(f"of-many-{number}", size)
            devices.append(ebsd.attach(f"of-many-{number}"))
            fill(devices[-1], size)
            sync(devices[-1])
        for at in range(run.rounds):
            for row in ROWS:
                say(f"round {at + 1} of {run.rounds}: {row.name}")
                turns = {"one": devices[:1], "all": devices}
                for name in turns if at % 2 == 0 else reversed(turns):
                    found[row.name][name].append(_together(row, turns[name], size, run.seconds))
    table = Table(
        f"{VOLUMES} volumes of {size // MIB} MiB together", ["", "unit", "one alone", "all together", "ratio"]
    )
    for row in ROWS:
        one, together = found[row.name]["one"], found[row.name]["all"]
        unit = "MiB/s" if row.sequential else "IOPS"
        table.add(row.name, unit, spread(one).text(), spread(together).text(), f"{median_ratio(together, one):.2f}")
    figures: dict[str, Any] = {"volumes": VOLUMES, "size": size, "rows": found}
    return Outcome([table], figures)


def _together(row: Row, devices: list[Device], size: int, seconds: float) -> float:
    found = rate(row, run_fio_on(row, devices, size, seconds))
    if row.writes:
        for device in devices:
            sync(device)
    return found
