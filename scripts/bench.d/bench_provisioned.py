"""Part ``provisioned``: a volume of 1 TiB against one that is as large as what is written to both."""

from __future__ import annotations

import time

from bench_arena import as_json, compete, table_of
from bench_figures import Table, median_ratio, spread
from bench_run import Outcome, Run

LARGE = 1 << 40


def run(run: Run) -> Outcome:
    sizes = {"1 TiB": LARGE, f"{run.size >> 20} MiB": run.size}
    took: dict[str, dict[str, list[float]]] = {name: {} for name in sizes}
    with run.ebsd("ebsd-provisioned") as ebsd:
        devices = {}
        for name, size in sizes.items():
            ebsd.create(name.replace(" ", "-"), size)
            devices[name] = ebsd.attach(name.replace(" ", "-"))
        samples = compete(devices, run.size, run.rounds, run.seconds)
        for at in range(run.rounds * 2):
            for name in sizes if at % 2 == 0 else reversed(sizes):
                for verb in ("detach", "attach"):
                    begin = time.perf_counter()
                    ebsd.ctl(verb, name.replace(" ", "-"))
                    took[name].setdefault(verb, []).append((time.perf_counter() - begin) * 1000)
    attach = Table("Attaching by what is provisioned", ["", *(f"{name}, ms" for name in sizes), "ratio"])
    for verb in ("attach", "detach"):
        large, small = (took[name][verb] for name in sizes)
        attach.add(verb, spread(large).text(), spread(small).text(), f"{median_ratio(large, small):.2f}")
    attach.notes.append("With the start of ebsctl.")
    return Outcome(
        [table_of("1 TiB provisioned against what is written", samples), attach],
        {"rows": as_json(samples), "ms": took},
    )
