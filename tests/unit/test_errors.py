"""The phrases that messages are made of."""

import ast
import importlib
import pickle
from pathlib import Path

import pytest

from simpo_megatron import errors
from simpo_megatron.errors import (
    ConfigError,
    DataError,
    PeerFailedError,
    StoppedBySignal,
    listed,
    report_error,
    require,
    status_line,
    visible,
)


@pytest.mark.parametrize(
    ("things", "said"),
    [([], ""), ([3], "3"), ([3, 5, 8], "3, 5, 8"), (range(4), "0, 1, 2 and 1 more"), ("abcde", "a, b, c and 2 more")],
)
def test_what_does_not_fit_is_counted(things, said):
    assert listed(things, 3) == said


def test_a_thousand_things_make_one_readable_line():
    said = listed((f"rank {n}" for n in range(1000)), 2, "; ")
    assert said == "rank 0; rank 1 and 998 more"


def test_what_holds_is_silent_and_what_does_not_names_the_key():
    require(True, "beta", 2.0, "above 0")
    with pytest.raises(ConfigError, match=r"^beta: found -1\.0, expected above 0$"):
        require(False, "beta", -1.0, "above 0")


@pytest.mark.parametrize(
    ("error", "options", "line", "exit_code"),
    [
        (DataError("a.jsonl:3: no pair"), {}, "ERROR simpo_megatron: a.jsonl:3: no pair\n", 3),
        (DataError("a.jsonl:3: no pair"), {"rank": 2}, "ERROR simpo_megatron rank 2: a.jsonl:3: no pair\n", 3),
        (StoppedBySignal("SIGTERM"), {"rank": 0}, "STOPPED simpo_megatron rank 0: SIGTERM\n", 75),
        (PeerFailedError("gone"), {"rank": 0, "kind": "STOPPED"}, "STOPPED simpo_megatron rank 0: gone\n", 6),
        (OSError("full"), {"rank": 1}, "ERROR simpo_megatron rank 1: unexpected OSError: full\n", 1),
    ],
)
def test_every_error_is_reported_in_one_form(error, options, line, exit_code, capsys):
    assert report_error(error, **options) == exit_code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\u202eabc\u2066", r"\u202eabc\u2066"),
        ("a\u2028b\x85c\x9bd", r"a\u2028b\x85c\x9bd"),
        ("/data/\udcff.jsonl", r"/data/\udcff.jsonl"),
        ("Grüße, 你好 👩\u200d🚀", "Grüße, 你好 👩\u200d🚀"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_its_escape(text, shown):
    assert visible(text) == shown
    shown.encode("utf-8")


def test_lines_of_a_text_stay_where_they_are_wanted():
    assert visible("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


def test_an_error_is_one_line_of_500_characters_that_ends_with_what_to_do(capsys):
    report_error(ConfigError("key: found " + "x\n" * 1000 + ", expected y; do z"), rank=0)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and len(line) == 501 and line.endswith(", expected y; do z\n")
    assert line.startswith("ERROR simpo_megatron rank 0: key: found x\\nx")
    assert status_line("ERROR", "short") == "ERROR simpo_megatron: short"


PACKAGE = Path(errors.__file__).parent


def error_classes():
    """Returns each error of the package, from whichever module."""
    modules = [
        path
        for path in PACKAGE.rglob("*.py")
        if any(isinstance(node, ast.ClassDef) and node.bases for node in ast.parse(path.read_text()).body)
        and "Error)" in path.read_text()
    ]
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in sorted(modules)]
    found = [value for name in names for value in vars(importlib.import_module(name)).values()]
    return sorted({v for v in found if isinstance(v, type) and issubclass(v, errors.SimPOError)}, key=str)


def test_every_error_reaches_another_rank_as_it_is_and_can_be_told_in_more_words():
    """Ranks send each other their errors; who agrees on one raises it with the rank, `type(error)(text)`."""
    kinds = error_classes()
    assert len(kinds) > 12
    for kind in kinds:
        error = kind("what is wrong")
        error.exit_code = 9
        heard = pickle.loads(pickle.dumps(error))
        assert (type(heard), str(heard), heard.exit_code, heard.speaker) == (kind, "what is wrong", 9, error.speaker)
