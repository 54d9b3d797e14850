"""The documentation is true: its commands run in the order of its pages, its flags, metrics and messages exist.

A block that cannot run here stands behind a comment `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from simpo_megatron.cli import COMMANDS
from simpo_megatron.config.options import find_option
from simpo_megatron.data.records import ENDLESS_TEMPLATE, UNUSABLE_REASONS
from simpo_megatron.training.step.metrics import SUMMED

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)

# Runs what is handed to it as JSON in one process, one entry after the other; python blocks of a page share names.
RUNNER = """
import contextlib, io, json, subprocess, sys, traceback
from simpo_megatron.cli import main
results, names = [], {}
for entry in json.load(sys.stdin):
    page, code = entry["page"], entry["code"]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            if entry["argv"] is None:
                exec(code, names.setdefault(page, {}))
                result = 0
            elif entry["argv"][0] == "simpo":
                result = main(entry["argv"][1:])
            else:
                done = subprocess.run([sys.executable, *entry["argv"][1:]], capture_output=True, text=True)
                printed.write(done.stdout + done.stderr)
                result = done.returncode
    except BaseException:
        printed.write(traceback.format_exc())
        result = 1
    results.append({"result": result, "printed": printed.getvalue()})
json.dump(results, open(sys.argv[1], "w"))
"""


class Block(NamedTuple):
    page: str
    language: str
    code: str
    reason: str | None
    """The reason why it is not run."""


def pages() -> list[str]:
    """The written pages, in the order of the site."""

    class Loader(yaml.SafeLoader):
        """Reads mkdocs.yml, whose tags name python functions."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)

    def leaves(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [leaf for value in values for leaf in leaves(value)]

    site = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    return [page for page in leaves(site["nav"]) if (DOCS / page).exists()]


def blocks() -> list[Block]:
    return [
        Block(page, match["language"], match["code"], match["reason"])
        for page in pages()
        for match in BLOCK.finditer((DOCS / page).read_text())
        if match["language"] in ("bash", "python")
    ]


def commands(code: str) -> list[list[str]]:
    """The commands of a block of bash, as lists of words."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def entries() -> list[dict]:
    """The entries to run: each command, each block of python, and the cells of the notebook."""
    found: list[dict] = []
    for block in blocks():
        if block.reason is not None:
            continue
        several = commands(block.code) if block.language == "bash" else [None]
        found += [{"page": block.page, "code": block.code, "argv": argv} for argv in several]
    notebook = json.loads((ROOT / "examples" / "demo.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [*found, {"page": "demo.ipynb", "code": "\n".join(cells), "argv": None}]


ENTRIES = entries()


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """(the folder where all ran, the results of ENTRIES)."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples").symlink_to(ROOT / "examples")
    command = [sys.executable, "-c", RUNNER, str(folder / "results.json")]
    subprocess.run(command, input=json.dumps(ENTRIES), text=True, cwd=folder, timeout=900, check=True)
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("index", range(len(ENTRIES)), ids=[f"{e['page']}-{i}" for i, e in enumerate(ENTRIES)])
def test_every_command_and_example_runs(session, index):
    _, results = session
    assert results[index]["result"] == 0, f"{ENTRIES[index]['code']}\n{results[index]['printed'][-2000:]}"


def test_every_metric_of_a_run_is_in_the_glossary(session):
    folder, _ = session
    glossary = set(re.findall(r"`([\w/]+)`", (DOCS / "reference" / "metrics.md").read_text()))
    records = [json.loads(line) for line in (folder / "runs/demo/metrics.jsonl").read_text().splitlines()]
    logged = {key.removeprefix("eval/") for record in records for key in record}
    named = {name for name in SUMMED if not name.startswith("_")}
    # What only some runs log.
    named |= {"repetition", "load_balancing_loss", "failed_saves", "pair_ids", "slowest_rank_behind", "mfu"}
    assert (logged | named) - glossary == set()


def test_flags_of_every_command_exist():
    for block in blocks():
        for words in commands(block.code) if block.language == "bash" else ():
            if words[0] == "simpo" and words[1] != "--version":
                assert words[1] in COMMANDS, words
            if words[:2] == ["simpo", "train"]:
                own = {"--config", "--explain-config", "--help", "--help-all", "--nemo-config", "--preset"}
                for flag in (word for word in words if word.startswith("--") and word not in own):
                    find_option(flag.removeprefix("--").replace("-", "_"), block.page)


def test_lines_that_troubleshooting_explains_are_said_somewhere():
    constants = "\n".join(
        node.value
        for path in (ROOT / "simpo_megatron").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    rows = re.findall(r"^\| (.*?) \|", (DOCS / "guides/troubleshooting.md").read_text(), re.M)
    lines = [line for row in rows for line in re.findall(r"`([^`]+)`", row)]
    assert len(lines) >= 10
    for line in lines:
        for piece in re.split(r"\d+|\bN\b|\.\.\.", line):
            assert piece.strip() in constants, f"{line!r}: {piece!r} is said nowhere"


def test_every_reason_for_which_a_record_is_dropped_is_explained():
    first_words = {
        re.match(r"[a-z_0-9]*", ast.unparse(node.args[0]).strip("f'\""))[0]
        for path in (ROOT / "simpo_megatron" / "data").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "BadRecord"
    }
    explained = set(re.findall(r"`([a-z_0-9]+)`", (DOCS / "reference" / "reasons.md").read_text()))
    handed_on = {"", "reason", "empty_"}
    assert len(first_words) > 30 and first_words - handed_on - explained == set()
    assert {*UNUSABLE_REASONS, ENDLESS_TEMPLATE, "bad_json", "truncated_json", "empty_chosen"} <= explained


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []
