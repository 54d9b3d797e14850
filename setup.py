"""Shim of pyproject.toml, for the one thing that it cannot say: configs/ lies beside the package and goes inside it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["simpo_megatron", "simpo_megatron.*"]), "simpo_megatron.configs"],
    package_dir={"simpo_megatron.configs": "configs"},
)
