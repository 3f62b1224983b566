"""Only what pyproject.toml cannot say: where the cffi binding is described."""

from setuptools import setup

setup(cffi_modules=["native/build_native.py:ffibuilder"])
