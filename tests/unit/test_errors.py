"""The phrases that messages are made of."""

import pytest

from simpo_megatron.errors import ConfigError, listed, require


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
