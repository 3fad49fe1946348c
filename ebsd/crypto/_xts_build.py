"""Builds ``ebsd.crypto._xts``: xts_vaes_kernel.c and xts_kernel.c over the host's libcrypto, by cffi in API mode."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI  # type: ignore[import-untyped]

HERE = Path(__file__).resolve().parent
SOURCES = ("xts_vaes_kernel.c", "xts_kernel.c")


def _text() -> str:
    """Return one translation unit of all sources."""
    return "\n".join(f'#line 1 "{name}"\n{(HERE / name).read_text()}' for name in SOURCES)


ffibuilder = FFI()
# One text for both sides: what the C compiler checks is what Python calls.
ffibuilder.cdef((HERE / "xts_kernel.h").read_text())
ffibuilder.set_source(
    "ebsd.crypto._xts",
    _text(),
    include_dirs=[str(HERE)],
    libraries=["crypto"],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-pthread"],
    extra_link_args=["-pthread"],
)

if __name__ == "__main__":
    # In place, for a checkout that is not installed: `python ebsd/crypto/_xts_build.py`
    ffibuilder.compile(tmpdir=str(HERE.parents[1]), verbose=True)
