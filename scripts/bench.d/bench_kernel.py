"""Part ``cipher``: the native XTS kernel against ``openssl speed``, both in bytes per second of CPU time.

CPU time, not the clock on the wall: both compute without a wait, and other work on the host counts for neither.
``openssl speed`` repeats one 4 KiB block in place with one tweak; ours is what the engine does: 1 MiB from one buffer
into another, 256 data units, a tweak for each.
"""

from __future__ import annotations

import os
import subprocess
import time

from bench_figures import Table, median_ratio, parse_openssl_speed, spread
from bench_run import Outcome, Run, say

UNIT = 4096
REQUEST = 1 << 20


def run(run: Run) -> Outcome:
    say("cipher")
    results = kernel_rounds(run.rounds, 1)
    table = Table("XTS-AES-256, 4 KiB units, GB per second of CPU time", ["", "ebsd", "openssl speed", "ratio"])
    for name, row in results.items():
        ours, theirs = ([value / 1e9 for value in row[side]] for side in ("ebsd", "openssl"))
        table.add(name, spread(ours).text(2), spread(theirs).text(2), f"{median_ratio(ours, theirs):.2f}")
    table.notes.append(f"ebsd: requests of 1 MiB. {openssl_version()}: one block of 4 KiB, in place.")
    return Outcome([table], results)


def our_rate(encrypt: bool, seconds: float, *, request: int = REQUEST) -> float:
    """Return bytes per CPU second of this process, which is to do nothing else meanwhile."""
    from ebsd.crypto.xts import XtsKey  # here, so that the rest can be imported without the compiled module

    source, target = bytearray(os.urandom(request)), bytearray(request)
    with XtsKey(os.urandom(64)) as key:
        run = key.encrypt if encrypt else key.decrypt
        run(source, target, unit=UNIT, first_tweak=0)
        batch = max(1, (16 << 20) // request)
        done = 0
        begin = time.process_time()
        while (took := time.process_time() - begin) < seconds:
            for _ in range(batch):
                run(source, target, unit=UNIT, first_tweak=done)
                done += request // UNIT
        return done * UNIT / took


def openssl_rate(encrypt: bool, seconds: int) -> float:
    """Return bytes per CPU second of ``openssl speed``; it takes whole seconds."""
    command = ["openssl", "speed", "-mr", "-seconds", str(seconds), "-bytes", str(UNIT), "-evp", "aes-256-xts"]
    done = subprocess.run(
        command if encrypt else [*command, "-decrypt"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return parse_openssl_speed(done.stdout)


def kernel_rounds(rounds: int, seconds: int) -> dict[str, dict[str, list[float]]]:
    """Return {encrypt, decrypt} -> {ebsd, openssl} -> bytes per CPU second, round by round."""
    results: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name in ("encrypt", "decrypt"):
            row = results.setdefault(name, {"ebsd": [], "openssl": []})
            row["ebsd"].append(our_rate(name == "encrypt", seconds))
            row["openssl"].append(openssl_rate(name == "encrypt", seconds))
    return results


def openssl_version() -> str:
    return subprocess.run(["openssl", "version"], capture_output=True, text=True, check=True).stdout.strip()
