"""The one thing pyproject.toml cannot say: which extension module cffi has to build."""

from setuptools import setup

setup(cffi_modules=["ebsd/crypto/_xts_build.py:ffibuilder"])
