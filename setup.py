"""The one thing pyproject.toml cannot say: which extension modules cffi has to build."""

from setuptools import setup

setup(
    cffi_modules=[
        "ebsd/crypto/_xts_build.py:ffibuilder",
        "ebsd/crypto/_digest_build.py:ffibuilder",
        "ebsd/volume/_fuse_build.py:ffibuilder",
        "ebsd/volume/_core_build.py:ffibuilder",
    ]
)
