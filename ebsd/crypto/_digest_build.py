"""Builds ``ebsd.crypto._digest``: digest_kernel.c over the host's libcrypto, by cffi in API mode."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI  # type: ignore[import-untyped]

HERE = Path(__file__).resolve().parent

ffibuilder = FFI()
# One text for both sides: what the C compiler checks is what Python calls.
ffibuilder.cdef((HERE / "digest_kernel.h").read_text())
ffibuilder.set_source(
    "ebsd.crypto._digest",
    (HERE / "digest_kernel.c").read_text(),
    include_dirs=[str(HERE)],
    libraries=["crypto"],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
)

if __name__ == "__main__":
    # In place, for a checkout that is not installed: `python ebsd/crypto/_digest_build.py`
    ffibuilder.compile(tmpdir=str(HERE.parents[1]), verbose=True)
