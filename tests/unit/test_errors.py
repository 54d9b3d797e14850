"""The phrases that messages are made of."""

import pytest

from simpo_megatron.errors import (
    ConfigError,
    DataError,
    PeerFailedError,
    StoppedBySignal,
    listed,
    report_error,
    require,
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
