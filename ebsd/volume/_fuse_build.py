"""Builds ``ebsd.volume._fuse``: native/transport.c over the host's libfuse, by cffi in API mode."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cffi import FFI  # type: ignore[import-untyped]

HERE = Path(__file__).resolve().parent / "native"


def _pkg_config(what: str) -> list[str]:
    return subprocess.run(["pkg-config", what, "fuse3"], check=True, capture_output=True, text=True).stdout.split()


ffibuilder = FFI()
# One text for both sides: what the C compiler checks is what Python calls.
ffibuilder.cdef((HERE / "transport.h").read_text())
ffibuilder.set_source(
    "ebsd.volume._fuse",
    (HERE / "transport.c").read_text(),
    include_dirs=[str(HERE)],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-pthread", *_pkg_config("--cflags")],
    extra_link_args=["-pthread", *_pkg_config("--libs")],
)

if __name__ == "__main__":
    # In place, for a checkout that is not installed: `python ebsd/volume/_fuse_build.py`
    ffibuilder.compile(tmpdir=str(HERE.parents[2]), verbose=True)
