"""The needs of Triton on a machine where it compiles kernels."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


@functools.cache
def missing_for_triton() -> str | None:
    """The first thing that Triton needs and this machine lacks; None where it can compile.

    It also compiles the C code that launches kernels, which includes Python's header. Slim container images often
    have neither.

    Source: triton.runtime.build.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler"
    folders = sysconfig.get_config_var("INCLUDEPY"), sysconfig.get_path("include")
    if not any(folder and Path(folder, "Python.h").is_file() for folder in folders):
        return "Python.h, of the package python3-dev"
    return None
