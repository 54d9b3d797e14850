"""Checks that pass, hang, die or raise, for the process that runs checks to import."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from simpo_megatron.gpu_check.verdict import CheckSetting, Verdict


def passes(setting: CheckSetting) -> Verdict:
    return Verdict.of(True, str(os.getpid()), "", error=float("inf"))


def hangs(setting: CheckSetting) -> Verdict:
    # Started before, as a run of the trainer would be.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", str(setting.folder)])
    time.sleep(300)
    raise AssertionError


def dies(setting: CheckSetting) -> Verdict:
    os._exit(3)


def raises(setting: CheckSetting) -> Verdict:
    raise ValueError("a sentence\nand more")
