"""Truncation: the rule's promises over random lengths, and twelve pairs beside the rules of two others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpo_megatron.data import PairOptions
from simpo_megatron.data.tokenization.truncation import kept_tokens, princeton_kept_tokens
from simpo_megatron.errors import ConfigError

LENGTHS = st.integers(1, 6000)


@st.composite
def some_options(draw):
    max_length = draw(st.integers(2, 3000))
    max_prompt_length = draw(st.integers(1, max_length - 1))
    least = draw(st.integers(1, max_length - max_prompt_length))
    return PairOptions(max_length=max_length, max_prompt_length=max_prompt_length, min_response_tokens=least)


@given(prompt=LENGTHS, chosen=LENGTHS, rejected=LENGTHS, options=some_options())
def test_what_is_kept_fits_and_nothing_is_cut_without_need(prompt, chosen, rejected, options):
    kept = kept_tokens(prompt, chosen, rejected, options)
    limit = options.max_length
    for length, left in ((chosen, kept.chosen), (rejected, kept.rejected)):
        assert kept.prompt + left <= limit
        assert min(length, options.min_response_tokens) <= left <= length
        # A response is cut only when it fills the limit: no token of room is left beside a cut.
        assert left == length or kept.prompt + left == limit
    assert min(prompt, options.max_prompt_length) <= kept.prompt <= prompt
    assert kept.prompt == prompt or kept.prompt + max(kept.chosen, kept.rejected) == limit
    if prompt + max(chosen, rejected) <= limit:
        assert kept == (prompt, chosen, rejected)


@given(prompt=LENGTHS, short=LENGTHS, long=LENGTHS, options=some_options())
def test_a_response_is_not_cut_because_the_other_one_is_long(prompt, short, long, options):
    kept = kept_tokens(prompt, short, long, options)
    if kept.prompt + short <= options.max_length:
        assert kept.chosen == short
    assert kept_tokens(prompt, long, short, options) == (kept.prompt, kept.rejected, kept.chosen)


@given(prompt=LENGTHS, chosen=LENGTHS, rejected=LENGTHS, options=some_options())
def test_dropping_instead_of_cutting_keeps_every_prompt_whole(prompt, chosen, rejected, options):
    drop = PairOptions(**{**vars(options), "long_prompt": "drop"})
    kept, cut = kept_tokens(prompt, chosen, rejected, drop), kept_tokens(prompt, chosen, rejected, options)
    assert kept == (cut if cut.prompt == prompt else None)


def trl_kept_tokens(prompt, chosen, rejected, max_length):
    """TRL's rule without max_prompt_length: both responses end at max_length - the longer one.

    A negative end counts from behind, as in any Python slice.
    """
    longer = max(chosen, rejected)
    if prompt + longer <= max_length:
        return prompt, chosen, rejected
    return prompt, len(range(chosen)[: max_length - longer]), len(range(rejected)[: max_length - longer])


# (prompt, chosen, rejected): ours, princeton's, TRL's; max_length 1024, max_prompt_length 800.
FIXED = {
    (100, 200, 300): ((100, 200, 300), (100, 200, 300), (100, 200, 300)),
    (900, 124, 124): ((900, 124, 124), (900, 124, 124), (900, 124, 124)),
    (900, 125, 100): ((899, 125, 100), (800, 125, 100), (900, 125, 100)),
    (200, 900, 400): ((200, 824, 400), (200, 224, 224), (200, 124, 124)),
    (100, 2000, 300): ((100, 924, 300), (100, 224, 224), (100, 1024, 0)),
    (100, 300, 2000): ((100, 300, 924), (100, 224, 224), (100, 0, 1024)),
    (100, 5000, 5000): ((100, 924, 924), (100, 224, 224), (100, 1024, 1024)),
    (1023, 2, 1): ((1022, 2, 1), (800, 2, 1), (1023, 2, 1)),
    (1024, 1, 1): ((1023, 1, 1), (800, 1, 1), (1024, 1, 1)),
    (5000, 10, 20): ((1004, 10, 20), (800, 10, 20), (5000, 10, 20)),
    (5000, 500, 20): ((800, 224, 20), (800, 224, 20), (5000, 500, 20)),
    (800, 224, 224): ((800, 224, 224), (800, 224, 224), (800, 224, 224)),
}


@pytest.mark.parametrize("lengths", FIXED, ids=str)
def test_fixed_pairs_are_cut_as_listed_by_us_and_by_others(lengths):
    options = PairOptions(max_length=1024, max_prompt_length=800)
    ours, princeton, trl = FIXED[lengths]
    assert kept_tokens(*lengths, options) == ours
    assert princeton_kept_tokens(*lengths, options) == princeton
    assert trl_kept_tokens(*lengths, 1024) == trl


def test_limits_that_would_empty_a_response_are_refused():
    for wrong in (
        {"max_length": 512, "max_prompt_length": 512},
        {"max_length": 512, "max_prompt_length": 500, "min_response_tokens": 13},
        {"max_length": 0},
        {"long_prompt": "keep"},
        {"max_bad_fraction": float("nan")},
    ):
        with pytest.raises(ConfigError):
            PairOptions(**wrong)
