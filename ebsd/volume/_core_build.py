"""Builds ``ebsd.volume._core``: the native engine, native/*.c, by cffi in API mode."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cffi import FFI  # type: ignore[import-untyped]

HERE = Path(__file__).resolve().parent / "native"
SOURCES = ("claims.c", "leaves.c", "layers.c", "changes.c", "lane.c", "hotread.c", "hotwrite.c", "core.c")


def _text() -> str:
    """Return one translation unit of all sources; it changes with every header, so that a build sees that, too."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(HERE.glob("*.h")))).hexdigest()
    parts = [f'#line 1 "{name}"\n{(HERE / name).read_text()}' for name in SOURCES]
    return "\n".join((f"/* headers: {digest} */", *parts))


ffibuilder = FFI()
# One text for both sides: what the C compiler checks is what Python calls.
ffibuilder.cdef((HERE / "core.h").read_text())
ffibuilder.set_source(
    "ebsd.volume._core",
    _text(),
    include_dirs=[str(HERE)],
    define_macros=[("_GNU_SOURCE", "1")],
    libraries=["crypto"],
    extra_compile_args=[
        "-O2", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong", "-Wall", "-Wextra",
        "-Wno-unused-parameter", "-pthread",
    ],
    extra_link_args=["-pthread"],
)  # fmt: skip

if __name__ == "__main__":
    # In place, for a checkout that is not installed: `python ebsd/volume/_core_build.py`
    ffibuilder.compile(tmpdir=str(HERE.parents[2]), verbose=True)
