"""The one rule by which pairs that are too long are cut, as a pure function over lengths."""

from typing import NamedTuple

from simpo_megatron.data.pair_options import PairOptions


class KeptTokens(NamedTuple):
    """The number of tokens that stay: the end of the prompt (after its BOS), the beginning of each response."""

    prompt: int
    chosen: int
    rejected: int


def kept_tokens(prompt: int, chosen: int, rejected: int, options: PairOptions) -> KeptTokens | None:
    """Returns what stays of a pair, in tokens, or None when its prompt is too long and must not be cut.

    A pair that fits is not touched. Otherwise the prompt gives way first, no further than needed and never
    below `max_prompt_length`; then each response that is still too long is cut on its own. A response that
    fits is never touched because the other one is long, and no response is emptied.
    """
    room_for_prompt = max(options.max_prompt_length, options.max_length - max(chosen, rejected))
    if prompt > room_for_prompt and options.long_prompt == "drop":
        return None
    kept_prompt = min(prompt, room_for_prompt)
    room = options.max_length - kept_prompt
    return KeptTokens(kept_prompt, min(chosen, room), min(rejected, room))


def princeton_kept_tokens(prompt: int, chosen: int, rejected: int, options: PairOptions) -> KeptTokens:
    """Returns what stays under the paper's rule: the prompt's very end, both responses cut alike.

    Source: princeton-nlp/SimPO, scripts/simpo_trainer.py, tokenize_row with truncation_mode keep_end.
    """
    longer = max(chosen, rejected)
    if prompt + longer <= options.max_length:
        return KeptTokens(prompt, chosen, rejected)
    prompt = min(prompt, options.max_prompt_length)
    if prompt + longer <= options.max_length:
        return KeptTokens(prompt, chosen, rejected)
    room = options.max_length - options.max_prompt_length
    return KeptTokens(prompt, min(chosen, room), min(rejected, room))
