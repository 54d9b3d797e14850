"""Token ids of pairs: one encoding of the whole text, cut by offsets where the response begins."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simpo_megatron.data.pair_options import NO_TEMPLATE, PairOptions
from simpo_megatron.data.records import ENDLESS_TEMPLATE, BadRecord, PreferenceRecord
from simpo_megatron.data.rendering import (
    EndlessTemplateError,
    PairRenderer,
    RenderedPair,
    bounds_of_templates,
    chat_template_of,
    special_texts,
)
from simpo_megatron.data.tokenization.backends import (
    NO_PROBLEMS,
    as_is_backend,
    backend_spec,
    encode,
    first_line,
    marked_backend,
    problems_named,
)
from simpo_megatron.data.tokenization.boundaries import PairSplitter, SplitPair
from simpo_megatron.data.tokenization.truncation import kept_tokens, princeton_kept_tokens
from simpo_megatron.data.tokenizer_files import check_tokenizer_files
from simpo_megatron.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PARTS = ("prompt", "chosen", "rejected")
"""The texts of a pair, in the order in which its ids, lengths and cut tokens are listed."""

_LONGEST_SPECIAL = 1000


@dataclass(frozen=True)
class TokenizedPair:
    """One pair of a dataset: int32 arrays of token ids; the end tokens of a response are part of it.

    The masks, bool, say which tokens of a response the assistant wrote: these count in |y|, the others are context.
    None: all of them, as in every response of one turn. The last token of a response counts.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_mask: np.ndarray | None = None
    rejected_mask: np.ndarray | None = None

    @classmethod
    def from_marked(cls, prompt_ids: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> TokenizedPair:
        """Returns the pair that `marked` returns the arrays of."""
        masks = [None if (ids >= 0).all() else ids >= 0 for ids in (chosen, rejected)]
        plain = [
            ids if mask is None else np.where(mask, ids, ~ids)
            for ids, mask in zip((chosen, rejected), masks, strict=True)
        ]
        return cls(prompt_ids, plain[0], plain[1], *masks)

    def marked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns prompt, chosen and rejected ids, those of context as their complement `~id`, which is negative."""
        chosen, rejected = (ids if mask is None else np.where(mask, ids, ~ids) for ids, mask in self.responses)
        return self.prompt_ids, chosen, rejected

    @property
    def responses(self) -> tuple[tuple[np.ndarray, np.ndarray | None], ...]:
        """(ids, mask) of the chosen and of the rejected response."""
        return (self.chosen_ids, self.chosen_mask), (self.rejected_ids, self.rejected_mask)


@dataclass(frozen=True)
class EncodedPair:
    """A pair after truncation: its ids, tokens cut from prompt, chosen and rejected, and oddities to be counted."""

    ids: tuple[list[int], list[int], list[int]]
    """The arrays of `TokenizedPair.marked`."""
    lost: tuple[int, int, int] = (0, 0, 0)
    notes: tuple[str, ...] = field(default=())

    @property
    def pair(self) -> TokenizedPair:
        """The pair as a dataset has it."""
        return TokenizedPair.from_marked(*(np.array(ids, np.int32) for ids in self.ids))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Returns the transformers tokenizer of a Hugging Face folder; code that comes with it is never run.

    Raises: ConfigError when there is no such folder, one of its files is none, or transformers can make no tokenizer
        of it.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ConfigError(f"model: found no folder {str(folder)!r}, expected the Hugging Face folder of a model")
    check_tokenizer_files(Path(folder))
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        if isinstance(error, NO_PROBLEMS):
            raise
        reason = first_line(error)
        raise ConfigError(
            f"model: found no tokenizer in {folder} ({reason}), expected one that transformers loads"
        ) from error


class PairTokenizer:
    """Turns records into token ids by the rules of `options`, with a fast transformers tokenizer.

    Raises: DataError when the tokenizer is not a fast one, has no end token where one is needed, or a special token
        that is a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: PairOptions) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"tokenizer: found {type(tokenizer).__name__}, expected a fast tokenizer; it needs tokenizer.json"
            )
        longest = max(map(len, special_texts(tokenizer)), default=0)
        if longest > _LONGEST_SPECIAL:
            # Compiling patterns of them takes seconds per million characters.
            raise DataError(
                f"tokenizer: found a special token of {longest} characters, expected at most {_LONGEST_SPECIAL}"
            )
        self._options = options
        self._renderer = PairRenderer(tokenizer, options)
        self._bos = tokenizer.bos_token_id
        self._eos = tokenizer.eos_token_id
        if self._eos is None:
            raise DataError("tokenizer: found no eos_token, expected one that ends a response; set one")
        self._princeton = options.template_mode == "princeton"
        with problems_named():
            if self._princeton:
                self._backend = as_is_backend(tokenizer)
            elif options.chat_template == NO_TEMPLATE:
                self._backend = as_is_backend(tokenizer, post_processor=None)
            else:
                self._backend = marked_backend(tokenizer)
        added = self._backend.get_added_tokens_decoder()
        self._end_ids = {token_id for token_id, token in added.items() if token.special}
        self._splitter = PairSplitter(self._backend)

    def encode(self, records: list[PreferenceRecord]) -> list[EncodedPair | BadRecord]:
        """Returns, for each record in turn, its token ids or the reason why it has none."""
        results: list = []
        try:
            with bounds_of_templates():
                for found in self._renderer.render(records):
                    results.append(found)
        except EndlessTemplateError as error:
            results += [BadRecord(ENDLESS_TEMPLATE, str(error))] * (len(records) - len(results))
        rendered = {index: found for index, found in enumerate(results) if isinstance(found, RenderedPair)}
        split = self._split_princeton if self._princeton else self._split_clean
        for (index, texts), parts in zip(rendered.items(), split(list(rendered.values())), strict=True):
            try:
                prompt, chosen, rejected, notes = parts
                results[index] = self._finish(prompt, chosen, rejected, texts.notes + notes)
            except BadRecord as error:
                results[index] = error
        return results

    def _split_clean(self, pairs: list[RenderedPair]) -> list[SplitPair]:
        return [
            (self._one_bos(prompt), self._one_end(chosen), self._one_end(rejected), notes)
            for prompt, chosen, rejected, notes in self._splitter.split(pairs)
        ]

    def _split_princeton(self, pairs: list[RenderedPair]) -> list[SplitPair]:
        """Returns the same as `_split_clean`, by the paper's rule, which tokenises the prompt alone too.

        Source: princeton-nlp/SimPO, scripts/simpo_trainer.py, build_tokenized_answer and tokenize_row.
        """
        texts = [text for p in pairs for text in (p.prompt, p.prompt + p.chosen, p.prompt + p.rejected)]
        encodings = encode(self._backend, texts)
        parts: list[SplitPair] = []
        for index in range(len(pairs)):
            prompt, *whole = (encoding.ids for encoding in encodings[3 * index : 3 * index + 3])
            cuts = [len(prompt) - (prompt != ids[: len(prompt)]) for ids in whole]
            prompts = [ids[:cut] for ids, cut in zip(whole, cuts, strict=True)]
            responses = [ids[cut:] for ids, cut in zip(whole, cuts, strict=True)]
            for ids in prompts:
                if self._bos is not None and ids[:1] != [self._bos]:
                    ids.insert(0, self._bos)
            for ids in responses:
                if ids[-1:] != [self._eos]:
                    ids.append(self._eos)
            differs = ("boundary_differs",) if prompts[0] != prompts[1] else ()
            parts.append((prompts[0], responses[0], responses[1], differs))
        return parts

    def _one_bos(self, ids: list[int]) -> list[int]:
        if self._bos is None:
            return ids
        first = next((i for i, token in enumerate(ids) if token != self._bos), len(ids))
        return [self._bos, *ids[first:]]

    def _one_end(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] in self._end_ids else [*ids, self._eos]

    def _finish(self, prompt: list[int], chosen: list[int], rejected: list[int], notes: tuple) -> EncodedPair:
        if "boundary_differs" in notes:
            raise BadRecord(
                "boundary_differs", "a token joins the prompt to one response only, so they share no prompt"
            )
        if not prompt:
            raise BadRecord("empty_prompt", "the prompt has no token, so nothing could predict a response's first one")
        if chosen == rejected:
            raise BadRecord("identical_pair", "chosen and rejected are the same tokens")
        rule = princeton_kept_tokens if self._princeton else kept_tokens
        lengths = len(prompt), len(chosen), len(rejected)
        kept = rule(*lengths, self._options)
        if kept is None:
            raise BadRecord(
                "too_long_prompt", f"lengths {lengths} do not fit into max_length {self._options.max_length}"
            )
        if kept.prompt < lengths[0]:
            prompt = self._end_of_prompt(prompt, kept.prompt)
        chosen, rejected = _until_last_counted(chosen[: kept.chosen]), _until_last_counted(rejected[: kept.rejected])
        if not chosen or not rejected:
            raise BadRecord("cut_before_answer", "a response cut to max_length holds no token of the assistant")
        if chosen == rejected:
            raise BadRecord("identical_pair", "chosen and rejected are the same tokens once cut to max_length")
        lost = lengths[0] - kept.prompt, lengths[1] - len(chosen), lengths[2] - len(rejected)
        return EncodedPair((prompt, chosen, rejected), lost, notes)

    def _end_of_prompt(self, prompt: list[int], count: int) -> list[int]:
        if not self._princeton and prompt[0] == self._bos:
            return [self._bos, *prompt[len(prompt) - count + 1 :]]
        return prompt[len(prompt) - count :]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase, options: PairOptions) -> dict:
    """Returns the identity of the tokenisation: vocabulary, rules, special tokens, template."""
    template = chat_template_of(tokenizer, options)
    with problems_named():
        backend = backend_spec(tokenizer)
    identity = {
        "backend": backend,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "chat_template": template and template.identity(),
    }
    # Without a template that was asked for, texts hold special tokens; without one at all, they are mere texts.
    return identity | ({"special_tokens": "in texts"} if options.chat_template == NO_TEMPLATE else {})


def _until_last_counted(ids: list[int]) -> list[int]:
    """Returns `ids` without context at their end, which no counted token sees."""
    if ids and ids[-1] >= 0:
        return ids
    end = next((place for place in range(len(ids), 0, -1) if ids[place - 1] >= 0), 0)
    return ids[:end]


def use_one_thread() -> None:
    """Keeps the Rust part from starting threads, for processes that are already one of several."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
