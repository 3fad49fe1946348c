"""Part ``plain``: what encryption costs, an encrypted volume against an unencrypted one of the same ebsd."""

from __future__ import annotations

from dataclasses import asdict

from bench_arena import as_json, compete, table_of
from bench_hosts import loop_settings
from bench_rawio import quick_check
from bench_run import Outcome, Run


def run(run: Run) -> Outcome:
    with run.ebsd("ebsd-plain") as ebsd:
        ebsd.create("encrypted", run.size)
        ebsd.create("plain", run.size, encrypted=False)
        devices = {"encrypted": ebsd.attach("encrypted"), "unencrypted": ebsd.attach("plain")}
        samples = compete(devices, run.size, run.rounds, run.seconds)
        loop = {name: loop_settings(device) for name, device in devices.items()}
        without_fio = asdict(quick_check(devices["encrypted"].path, seconds=2))
    figures = {"rows": as_json(samples), "loop": loop, "without_fio": without_fio}
    return Outcome([table_of("Encrypted against unencrypted", samples)], figures)
