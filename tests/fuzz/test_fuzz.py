"""Bytes that somebody else made end in a result or a declared error: soon, in little memory, and nothing else.

CI runs the corpus and a fixed number of changes to it. ``EBSD_FUZZ_SECONDS=600 pytest tests/fuzz`` goes on for that
long with each target, with other dice each time; ``tests/fuzz/fuzz_guided.py`` is led by coverage (atheris). What they
found stands in ``corpus/<target>/``.
"""

from __future__ import annotations

import os
import random
import resource
import secrets
import time
from pathlib import Path

import pytest
from fuzz_mutator import changed
from fuzz_targets import TARGETS, Target

CORPUS = Path(__file__).with_name("corpus")
RUNS = 400
SECONDS = float(os.environ.get("EBSD_FUZZ_SECONDS", "0"))
SLOWEST = 10.0
"""Seconds of one run: a hang, however busy the host."""
MOST_MEMORY = 512 * 1024
"""KiB that a process may grow by for bytes of at most 256 KiB."""

pytestmark = pytest.mark.timeout(120 + 2 * SECONDS)


def corpus_of(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


def run(name: str, target: Target, data: bytes) -> None:
    started = time.monotonic()
    try:
        target.run(data)
    except target.errors:
        pass
    except BaseException as exc:
        path = Path(os.environ.get("TMPDIR", "/tmp")) / f"fuzz-{name}-{secrets.token_hex(4)}"
        path.write_bytes(data)
        raise AssertionError(f"{name}: {type(exc).__name__} for {path}") from exc
    assert time.monotonic() - started < SLOWEST, f"{name}: {data[:100]!r}"


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_what_their_parser_takes(name: str) -> None:
    """A corpus of refused seeds would test nothing behind the first check."""
    target = TARGETS[name]
    seeds = target.seeds()
    taken = 0
    for seed in seeds:
        try:
            target.run(seed)
        except target.errors:
            continue
        taken += 1
    assert taken >= 1
    if target.mend is not None:
        assert [target.mend(seed) for seed in seeds] == seeds


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_once_stays_mended(name: str) -> None:
    for data in corpus_of(name):
        run(name, TARGETS[name], data)


def test_the_corpus_belongs_to_targets() -> None:
    assert {path.name for path in CORPUS.iterdir() if path.is_dir()} <= set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_bytes_end_in_a_declared_error(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds() + corpus_of(name)
    seed = secrets.randbits(64) if SECONDS else 20
    dice = random.Random(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runs, until = 0, time.monotonic() + SECONDS
    while runs < RUNS or time.monotonic() < until:
        data = changed(seeds, dice, target.longest)
        run(name, target, data)
        if target.mend is not None:
            run(name, target, target.mend(data))
        runs += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MOST_MEMORY, f"{name}: {grown} KiB"
    if SECONDS:
        print(f"\n{name}: {runs} executions, dice {seed}, {grown} KiB")
