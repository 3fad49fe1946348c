"""Fuzz one target led by coverage: ``pip install atheris; python tests/fuzz/fuzz_guided.py TARGET SECONDS``.

New inputs stay in a temporary directory that it names; what it finds it writes there, too, as libFuzzer does.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["ebsd", "ebsctl"]):
    from fuzz_targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")


def main() -> None:
    name, seconds = sys.argv[1], sys.argv[2]
    target = TARGETS[name]
    work = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    for number, seed in enumerate(target.seeds()):
        (work / f"seed-{number}").write_bytes(seed)
    for path in (CORPUS / name).glob("*"):
        shutil.copy(path, work)

    def one(data: bytes) -> None:
        for variant in (data,) if target.mend is None else (data, target.mend(data)):
            try:
                target.run(variant)
            except target.errors:
                continue

    print(f"corpus and findings: {work}", flush=True)
    arguments = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048", f"-max_len={target.longest}"]
    atheris.Setup([sys.argv[0], *arguments, f"-artifact_prefix={work}/", str(work)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
