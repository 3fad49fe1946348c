"""The benchmark; see ``scripts/bench --help``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from bench_figures import MIB, Sample, Table, median_ratio, parse_size, spread  # noqa: E402 # found by the path above

DESCRIPTION = """\
Measure ebsd on this host: its cipher against openssl, its encrypted volumes against qemu-storage-daemon with a LUKS
image and against its own unencrypted volumes, its snapshots, and its copies against qemu-img. Needs root and installs
what is missing. Only ratios within one run count: the parties take turns, round by round, and a ratio is the median of
the rounds' ratios.
"""
PARTS = ("cipher", "device", "snapshots")
DEEP = "depth"
COPIES = "copies"
"""Only when they are asked for: they take long."""


STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"bench: {time.monotonic() - STARTED:4.0f} s  {text}", file=sys.stderr, flush=True)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under two minutes: fewer rounds, smaller volumes")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each measurement (5; with --quick 3)")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of one fio run (2; with --quick 0.5)")
    parser.add_argument("--size", type=_size, metavar="2G", help="of the volumes compared (1G; with --quick 256M)")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="make the working directory below DIR (/var/tmp)")
    parser.add_argument(
        "--part", action="append", choices=(*PARTS, COPIES, DEEP), help="only this part; may be repeated"
    )
    parser.add_argument(
        "--copied", type=_size, metavar="4G", help="size of the snapshot of part copies (4G; with --quick 512M)"
    )
    parser.add_argument("--depth", type=int, metavar="N", help="snapshots of part depth (10000; with --quick 100)")
    parser.add_argument(
        "--chain", type=int, metavar="N", help="restores in a row of part depth (1000; with --quick 10)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    chosen = parser.parse_args(argv)
    if chosen.rounds is not None and chosen.rounds < 1:
        parser.error("--rounds is at least 1")
    return chosen


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def measure_cipher(rounds: int, seconds: int) -> tuple[Table, dict[str, Any]]:
    from bench_kernel import kernel_rounds, openssl_version

    say("cipher")
    results = kernel_rounds(rounds, seconds)
    table = Table("1. XTS-AES-256, 4 KiB units, GB per second of CPU time", ["", "ebsd", "openssl speed", "ratio"])
    for name, row in results.items():
        ours, theirs = ([value / 1e9 for value in row[side]] for side in ("ebsd", "openssl"))
        table.add(name, spread(ours).text(2), spread(theirs).text(2), f"{median_ratio(ours, theirs):.2f}")
    table.notes.append(f"ebsd: requests of 1 MiB. {openssl_version()}: one block of 4 KiB, in place.")
    return table, results


def workloads(quick: bool) -> list[Any]:
    from bench_hosts import Row

    rows = [
        Row("sequential read 1 MiB", "read", MIB, 1),
        Row("sequential read 1 MiB, depth 4", "read", MIB, 4),
        Row("random read 4 KiB", "randread", 4096, 1),
        Row("random read 4 KiB, depth 16", "randread", 4096, 16),
        Row("sequential write 1 MiB", "write", MIB, 1),
        Row("sequential write 1 MiB, depth 4", "write", MIB, 4),
        Row("random write 4 KiB", "randwrite", 4096, 1),
        Row("random write 4 KiB, depth 16", "randwrite", 4096, 16),
    ]
    return [row for row in rows if not quick or row.depth != 4]


def measure_devices(
    root: Path, *, size: int, rounds: int, seconds: float, quick: bool
) -> tuple[list[Table], dict[str, Any]]:
    """Parts 2 and 3: the same rows on three devices, which take turns."""
    from bench_hosts import Ebsd, Peer, fill, loop_settings, peer_version, run_fio, sync
    from bench_rawio import quick_check

    rows = workloads(quick)
    samples: dict[str, dict[str, list[Sample]]] = {row.name: {} for row in rows}
    ebsd, peer = Ebsd(root / "ebsd"), Peer(root / "peer")
    with contextlib.ExitStack() as stack:
        stack.callback(ebsd.close)
        ebsd.start()
        ebsd.create("encrypted", size)
        ebsd.create("plain", size, encrypted=False)
        devices = {"ebsd": ebsd.attach("encrypted"), "plain": ebsd.attach("plain")}
        version = peer_version()
        if version is not None:
            stack.callback(peer.close)
            devices["peer"] = peer.start(size)
        for name, device in devices.items():
            say(f"filling {name}")
            fill(device, size)
        for at in range(rounds):
            for row in rows:
                say(f"round {at + 1} of {rounds}: {row.name}")
                order = list(devices) if at % 2 == 0 else list(reversed(devices))
                for name in order:
                    samples[row.name].setdefault(name, []).append(run_fio(row, devices[name], size, seconds))
                if row.writes:
                    for device in devices.values():
                        sync(device)
        settings = {name: loop_settings(device) for name, device in devices.items()}
        without_fio = asdict(quick_check(devices["ebsd"].path, seconds=2))
    tables = []
    if version is not None:
        tables.append(_comparison(f"2. ebsd against qemu-storage-daemon {version}", rows, samples, "peer", "peer"))
    else:
        say("qemu-storage-daemon is not installed: part 2 is left out")
    tables.append(_comparison("3. ebsd, encrypted against unencrypted", rows, samples, "plain", "unencrypted"))
    json_samples = {row: {name: [asdict(s) for s in runs] for name, runs in by.items()} for row, by in samples.items()}
    return tables, {"rows": json_samples, "loop": settings, "peer": version, "without_fio": without_fio}


def _comparison(
    title: str, rows: list[Any], samples: dict[str, dict[str, list[Sample]]], other: str, label: str
) -> Table:
    columns = ["", "unit", "ebsd", label, "ratio", "latency us", f"{label} us", "CPU us", f"{label} CPU us"]
    table = Table(title, columns)
    for row in rows:
        ours, theirs = samples[row.name]["ebsd"], samples[row.name][other]
        rates = [[s.mib_per_s if row.sequential else s.iops for s in runs] for runs in (ours, theirs)]
        table.add(
            row.name,
            "MiB/s" if row.sequential else "IOPS",
            *(spread(values).text() for values in rates),
            f"{median_ratio(*rates):.2f}",
            *(f"{spread([s.mean_us for s in runs]).median:.0f}" for runs in (ours, theirs)),
            *(f"{spread([s.server_us or 0.0 for s in runs]).median:.0f}" for runs in (ours, theirs)),
        )
    table.notes.append(
        "Through loop devices with direct I/O, page cache warm. CPU: of the serving process, per request."
    )
    return table


def measure_snapshots_part(root: Path, *, size: int, written: int, rounds: int) -> tuple[Table, dict[str, Any]]:
    from bench_hosts import Ebsd
    from bench_snapshots import measure_snapshots

    ebsd = Ebsd(root / "ebsd-snapshots")
    try:
        ebsd.start()
        results = measure_snapshots(ebsd, size, written, rounds, say)
    finally:
        ebsd.close()
    title = f"4. Snapshots of a volume of {size >> 30} GiB, {written / (1 << 30):g} GiB of it written"
    table = Table(title, ["", "unit", "median (min-max)"])
    for name, unit, values in (
        ("CreateSnapshot, idle", "ms", results.create_idle_ms),
        ("pause of I/O, idle", "us", results.pause_idle_us),
        ("CreateSnapshot, random writes running", "ms", results.create_busy_ms),
        ("pause of I/O, random writes running", "us", results.pause_busy_us),
        ("CreateVolume from the snapshot", "ms", results.restore_ms),
        ("maps on the disk, the volume's own included, per snapshot", "KiB", results.maps_kib),
        ("copy under another key", "MiB/s", results.copy_mib_s),
    ):
        if values:
            table.add(name, unit, spread(values).text())
    for name, grown in results.grown_by.items():
        table.add(f"space taken by a {name}", "KiB", f"{grown / 1024:.0f}")
    table.notes += [f"{name}: not measured: {why}" for name, why in results.failures.items()]
    return table, results.as_json()


def measure_copies_part(root: Path, *, size: int, rounds: int) -> tuple[list[Table], dict[str, Any]]:
    from bench_copies import measure_copies
    from bench_hosts import Ebsd

    ebsd = Ebsd(root / "ebsd-copies")
    try:
        ebsd.start()
        results = measure_copies(ebsd, root, size, rounds, say)
    finally:
        ebsd.close()
    return results.tables(), results.as_json()


def measure_depth_part(
    root: Path, *, size: int, depth: int, chain: int, seconds: float
) -> tuple[Table, dict[str, Any]]:
    from bench_depth import measure_depth
    from bench_hosts import Ebsd

    ebsd = Ebsd(root / "ebsd-depth")
    try:
        ebsd.start()
        depths = [at for at in (1, 10, 100, 1000, 3000) if at < depth] + [depth]
        results = measure_depth(ebsd, size=size, depths=depths, chain=chain, seconds=seconds, say=say)
    finally:
        ebsd.close()
    return results.table(size, depth, chain), results.as_json()


def host() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": list(os.getloadavg()),
    }


def main(argv: list[str] | None = None) -> int:
    chosen = arguments(argv)
    quick = chosen.quick
    rounds = chosen.rounds or (3 if quick else 5)
    seconds = chosen.seconds or (0.5 if quick else 2.0)
    size = chosen.size or ((256 << 20) if quick else (1 << 30))
    parts = chosen.part or PARTS
    # An end by signal is an exception, so that everything is taken down in order.
    signal.signal(signal.SIGTERM, _interrupted)
    begin = time.monotonic()
    before = host()
    tables: list[Table] = []
    figures: dict[str, Any] = {"host": before, "rounds": rounds, "seconds": seconds, "size": size}
    root = Path(tempfile.mkdtemp(prefix="ebsd-bench.", dir=chosen.dir or Path("/var/tmp")))
    try:
        if "cipher" in parts:
            table, figures["cipher"] = measure_cipher(rounds, 1)
            tables.append(table)
        if "device" in parts:
            made, figures["device"] = measure_devices(root, size=size, rounds=rounds, seconds=seconds, quick=quick)
            tables += made
        if "snapshots" in parts:
            span, written = (1 << 40, (1 if quick else 10) << 30)
            table, figures["snapshots"] = measure_snapshots_part(
                root, size=span, written=written, rounds=1 if quick else 3
            )
            tables.append(table)
        if COPIES in parts:
            copied = chosen.copied or ((512 << 20) if quick else (4 << 30))
            made, figures["copies"] = measure_copies_part(root, size=copied, rounds=rounds)
            tables += made
        if DEEP in parts:
            depth, chain = (100, 10) if quick else (10000, 1000)
            depth = depth if chosen.depth is None else chosen.depth
            chain = chain if chosen.chain is None else chosen.chain
            deep_size = chosen.size or (256 << 20)
            table, figures["depth"] = measure_depth_part(
                root, size=deep_size, depth=depth, chain=chain, seconds=seconds
            )
            tables.append(table)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    figures["took"] = time.monotonic() - begin
    for table in tables:
        print(table.markdown() if chosen.markdown else table.plain(), end="\n\n")
    load = f"{before['load'][0]:.1f} before, {os.getloadavg()[0]:.1f} after"
    print(
        f"{before['cpus']} CPUs, Linux {before['kernel']}, Python {before['python']}; {rounds} rounds, "
        f"{figures['took']:.0f} s; load {load} (median, min-max in parentheses)"
    )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
