"""Generated conversations in many shapes of templates: tokens are the template's own text, or the pair has a reason.

SIMPO_NUM_CONVERSATIONS says how many are tried in each shape, 20,000 in the widest check.
"""

import itertools
import os
import re

import numpy as np
import pytest
from chat_templates import SHAPES, with_tools
from conversations import rows
from test_data_rendering import WIDE, templated

from simpo_megatron.data import PairOptions
from simpo_megatron.data.records import BadRecord, UntrainedTurn, as_messages, to_record
from simpo_megatron.data.rendering import FINDINGS
from simpo_megatron.data.tokenization import PairTokenizer

NUM_CONVERSATIONS = int(os.environ.get("SIMPO_NUM_CONVERSATIONS", "120"))
OPTIONS = PairOptions(responses="assistant", **WIDE)
REASONS = {"template_leaves_out", "template_refused", "template_mismatch"}
# What these findings say is not the template's own rendering.
NOT_RENDERED = {"reasoning_put_back", "earlier_reasoning_kept", "opened_reasoning_left_out"}
NOT_RENDERED |= {"text_changed_by_tokenizer"}


def numbers_of(value):
    return set(re.findall(r"[0-9]{10}", str(value)))


def counts(turn):
    return turn["role"] == "assistant" and not isinstance(turn, UntrainedTurn)


def check_pair(tokenizer, record, result):
    """The decoded ids are what the template writes, and each turn's number stands where the turn belongs."""
    pair, notes = result.pair, set(result.notes)
    assert notes <= set(FINDINGS)

    def decode(ids):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    if "history_reasoning_left_out" not in notes:
        whole_prompt = decode(np.concatenate([pair.prompt_ids, pair.chosen_ids]))
        assert numbers_of(record.prompt) <= numbers_of(whole_prompt)
    for response, (ids, mask) in zip((record.chosen, record.rejected), pair.responses, strict=True):
        turns = as_messages(response, "assistant")
        end = 1 + max(number for number, turn in enumerate(turns) if counts(turn))
        text = decode([*pair.prompt_ids, *ids])
        if not notes & NOT_RENDERED:
            whole = tokenizer.apply_chat_template([*as_messages(record.prompt), *turns], record.tools, tokenize=False)
            rest = whole.removeprefix(text)
            assert rest != whole and (end < len(turns) or rest.strip() in ("", "<|endoftext|>")), (whole, text)
        assert text.endswith(("<|im_end|>", "<|endoftext|>"))
        mask = np.ones(len(ids), bool) if mask is None else mask
        written = numbers_of([turn for turn in turns[:end] if counts(turn)])
        others = numbers_of([turn for turn in turns[:end] if not counts(turn)])
        assert written <= numbers_of(decode(ids[mask])) and others <= numbers_of(decode(ids[~mask])), (text, turns)
        assert not others & numbers_of(decode(ids[mask]))
        if not notes & NOT_RENDERED:
            check_turns(tokenizer, record, turns, (pair.prompt_ids, ids, mask))


def check_turns(tokenizer, record, turns, tokens):
    """Each turn of the assistant goes on from the prompt that asks for it, and ends with an end token that counts."""
    prompt_ids, ids, mask = tokens
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    runs = edges.reshape(-1, 2).tolist()
    numbers = [number for number, turn in enumerate(turns) if counts(turn)]
    assert len(runs) == len(numbers)
    for (start, end), number in zip(runs, numbers, strict=True):
        known = [*as_messages(record.prompt), *turns[:number]]
        asked = tokenizer.apply_chat_template(known, record.tools, tokenize=False, add_generation_prompt=True)
        before = [*prompt_ids, *ids[:start]]
        assert tokenizer.decode(before, clean_up_tokenization_spaces=False) == asked
        assert tokenizer.decode(ids[start:end]).endswith(("<|im_end|>", "<|endoftext|>"))


def check_shape(shape, count):
    """(Pairs used, those of them with several turns.)"""
    tokenizer = templated(with_tools(SHAPES[shape]))
    pair_tokenizer, used, several = PairTokenizer(tokenizer, OPTIONS), 0, 0
    records = (to_record(row, OPTIONS) for row in rows(count, seed=7))
    while batch := list(itertools.islice(records, 64)):
        for record, result in zip(batch, pair_tokenizer.encode(batch), strict=True):
            if isinstance(result, BadRecord):
                assert result.reason in REASONS, result
                continue
            check_pair(tokenizer, record, result)
            used += 1
            several += result.pair.chosen_mask is not None
    return used, several


@pytest.mark.parametrize("shape", SHAPES)
def test_decoded_ids_are_the_templates_own_rendering_or_the_pair_stands_under_a_reason(shape):
    used, several = check_shape(shape, NUM_CONVERSATIONS)
    print(f"{shape}: {used} of {NUM_CONVERSATIONS} used, {several} of several turns")
    assert used > NUM_CONVERSATIONS / 5 and several > NUM_CONVERSATIONS / 20
