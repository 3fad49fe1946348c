"""The benchmark; see ``scripts/bench --help``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from bench_figures import Bar, Table, parse_size  # noqa: E402 # found by the path above
from bench_run import Outcome, Run, say  # noqa: E402
from bench_svg import picture  # noqa: E402

DESCRIPTION = """\
Measure ebsd on this host: its cipher, its volumes against what Debian has in user space, its snapshots and copies.
Needs root and installs what is missing. Only ratios within one run count: the parties take turns, round by round, and
a ratio is the median of the rounds' ratios. Parts:
"""


@dataclass(frozen=True)
class Part:
    """One part; ``module`` has ``run(Run) -> Outcome``."""

    name: str
    module: str
    about: str
    usual: bool = False
    """Measured when no part is named."""


PARTS: Final = (
    Part("cipher", "bench_kernel", "the XTS kernel against openssl speed", usual=True),
    Part("engine", "bench_engine", "the native engine against the reference, without a transport"),
    Part("peers", "bench_peers", "against qemu-storage-daemon, gocryptfs and nbdkit", usual=True),
    Part("plain", "bench_plain", "an encrypted volume against an unencrypted one", usual=True),
    Part("snapshots", "bench_snapshots", "creating, restoring, what a snapshot takes, how long I/O waits", usual=True),
    Part("snapshot-writes", "bench_snapshot_writes", "random writes right after a snapshot, and qcow2's"),
    Part("many", "bench_many", "eight attached volumes together against one"),
    Part("provisioned", "bench_provisioned", "1 TiB provisioned against what is written"),
    Part("latency", "bench_latency", "management with 1,000 volumes; memory of an attached one"),
    Part("copies", "bench_copies", "re-encrypting copies against qemu-img convert"),
    Part("depth", "bench_depth", "a volume with thousands of snapshots against one with a single one"),
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    about = "".join(f"  {part.name:16} {part.about}{'' if part.usual else ' (when named)'}\n" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=DESCRIPTION + about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="under two minutes: fewer rounds, smaller volumes")
    add("--rounds", type=int, metavar="N", help="rounds of each measurement (5; with --quick 3)")
    add("--seconds", type=float, metavar="S", help="length of one fio run (2; with --quick 0.3)")
    add("--size", type=_size, metavar="2G", help="of the volumes compared (1G; with --quick 128M)")
    add("--dir", type=Path, metavar="DIR", help="make the working directory below DIR (/var/tmp)")
    names = [part.name for part in PARTS]
    add("--part", action="append", choices=names, metavar="PART", help="only this part; may be repeated")
    add("--transport", choices=("native", "pyfuse3"), help="what serves the volumes (as ebsd is configured by default)")
    add("--copied", type=_size, metavar="4G", help="size of the snapshot of part copies (4G; with --quick 512M)")
    add("--depth", type=int, metavar="N", help="snapshots of part depth (10000; with --quick 100)")
    add("--chain", type=int, metavar="N", help="restores in a row of part depth (1000; with --quick 10)")
    add("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    add("--svg", type=Path, metavar="FILE", help="draw the ratios to peers into FILE")
    add("--markdown", action="store_true", help="print Markdown tables")
    chosen = parser.parse_args(argv)
    if chosen.rounds is not None and chosen.rounds < 1:
        parser.error("--rounds is at least 1")
    return chosen


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def asked(chosen: argparse.Namespace, root: Path) -> Run:
    """Return what the arguments ask for."""
    quick = chosen.quick
    return Run(
        root,
        quick=quick,
        rounds=chosen.rounds or (3 if quick else 5),
        seconds=chosen.seconds or (0.3 if quick else 2.0),
        size=chosen.size or ((128 << 20) if quick else (1 << 30)),
        sized=chosen.size is not None,
        settings="" if chosen.transport is None else f'transport = "{chosen.transport}"',
        copied=chosen.copied,
        depth=chosen.depth,
        chain=chosen.chain,
    )


def host() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": list(os.getloadavg()),
    }


def measure(run: Run, parts: list[str]) -> dict[str, Outcome]:
    """Run parts in the order of their table; each is done with its directory when the next one begins."""
    outcomes: dict[str, Outcome] = {}
    for part in PARTS:
        if part.name not in parts:
            continue
        say(f"part {part.name}")
        outcomes[part.name] = importlib.import_module(part.module).run(run)
        for path in run.root.iterdir():
            shutil.rmtree(path, ignore_errors=True)
    return outcomes


def main(argv: list[str] | None = None) -> int:
    chosen = arguments(argv)
    # An end by signal is an exception, so that everything is taken down in order.
    signal.signal(signal.SIGTERM, _interrupted)
    begin = time.monotonic()
    before = host()
    root = Path(tempfile.mkdtemp(prefix="ebsd-bench.", dir=chosen.dir or Path("/var/tmp")))
    run = asked(chosen, root)
    try:
        outcomes = measure(run, chosen.part or [part.name for part in PARTS if part.usual])
    finally:
        shutil.rmtree(root, ignore_errors=True)
    took = time.monotonic() - begin
    tables: list[Table] = [table for outcome in outcomes.values() for table in outcome.tables]
    for table in tables:
        print(table.markdown() if chosen.markdown else table.plain(), end="\n\n")
    load = f"{before['load'][0]:.1f} before, {os.getloadavg()[0]:.1f} after"
    print(
        f"{before['cpus']} CPUs, Linux {before['kernel']}, Python {before['python']}; {run.rounds} rounds, "
        f"{took:.0f} s; load {load} (median, min-max in parentheses)"
    )
    if chosen.json is not None:
        figures: dict[str, Any] = {"host": before, "rounds": run.rounds, "seconds": run.seconds, "size": run.size}
        figures |= {name: outcome.figures for name, outcome in outcomes.items()} | {"took": took}
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n")
    bars: list[Bar] = [bar for outcome in outcomes.values() for bar in outcome.bars]
    if chosen.svg is not None and bars:
        chosen.svg.write_text(picture("How many times as fast as its peers ebsd is", bars))
    return 0


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
