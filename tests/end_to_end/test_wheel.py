"""The wheel alone, outside the checkout: the command is there and trains, and nothing of the developers' is inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from ranks import REPOSITORY

NEWEST = REPOSITORY / ".venv-newest" / "bin" / "python"
PACKAGES_OF = (
    "import sys; print(*(path for path in sys.path if path.endswith(('site-packages', 'dist-packages'))), sep='\\n')"
)

pytestmark = pytest.mark.skipif(find_spec("build") is None, reason="the package build is not installed")


def run(*command: str | Path, cwd: Path, timeout: float = 300) -> str:
    """The output of `command`, outside of every checkout."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")
    }
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    assert sdist.name.removesuffix(".tar.gz") == "-".join(wheel.name.split("-")[:2])
    return wheel


def install(wheel: Path, folder: Path, python: str) -> Path:
    """The bin folder of a new environment with the wheel, which sees the packages of `python` behind it."""
    run(python, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    bin_folder = folder / "venv" / "bin"
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    run(python, "-m", "pip", "install", "-qq", "--no-deps", "--target", packages, wheel, cwd=folder)
    # Behind only now, or pip would find the checkout there, installed to be edited.
    (packages / "behind.pth").write_text(run(python, "-c", PACKAGES_OF, cwd=folder))
    command = bin_folder / "simpo"
    (packages / "bin" / "simpo").rename(command)
    command.write_text(f"#!{bin_folder / 'python'}\n" + command.read_text().partition("\n")[2])
    return bin_folder


def test_the_wheel_holds_what_the_commands_need_and_no_developer_script(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = {path.name for path in (REPOSITORY / "configs").glob("*.yaml")}
    assert {Path(name).name for name in names if name.startswith("simpo_megatron/configs/")} == configs
    assert {"simpo_megatron/py.typed", "simpo_megatron/demo/pairs.jsonl"} <= names
    modules = (REPOSITORY / "simpo_megatron").rglob("*.py")
    assert {str(path.relative_to(REPOSITORY)) for path in modules} <= names
    templates = [path for path in REPOSITORY.glob("simpo_megatron/**/*templates/*") if path.is_file()]
    assert {path.suffix for path in templates} >= {".jinja", ".html"}
    assert {str(path.relative_to(REPOSITORY)) for path in templates} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"simpo_megatron"}
    assert [name for name in names if "write_" in name or "topics" in name] == []


@pytest.mark.parametrize("python", [sys.executable, str(NEWEST)], ids=["this", "newest"])
def test_the_command_trains_the_demo_from_an_empty_folder(wheel, python, tmp_path):
    if not Path(python).exists():
        pytest.skip("no .venv-newest; `make test-newest` makes it")
    bin_folder = install(wheel, tmp_path, python)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "simpo COMMAND" in run(bin_folder / "simpo", "--help", cwd=empty)
    where = "import simpo_megatron; print(simpo_megatron.__file__)"
    assert run(bin_folder / "python", "-c", where, cwd=empty).startswith(str(tmp_path / "venv"))
    named = "from simpo_megatron import load_config; c = load_config(config='llama3_70b_64xh100', model='m', data='d')"
    run(bin_folder / "python", "-c", f"{named}; assert c.parallel.sizes.tensor == 8", cwd=empty)
    run(bin_folder / "simpo", "train", "--train-iters", "2", "--log-interval", "1", cwd=empty)
    (metrics,) = empty.glob("runs/*/metrics.jsonl")
    steps = [record for line in metrics.read_text().splitlines() if "loss" in (record := json.loads(line))]
    assert [step["iteration"] for step in steps] == [1, 2]
