"""Token ids of pairs: one encoding of the whole text, cut by offsets where the response begins."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simpo_megatron.data.pair_options import NO_TEMPLATE, PairOptions
from simpo_megatron.data.records import ENDLESS_TEMPLATE, BadRecord, PreferenceRecord
from simpo_megatron.data.rendered_pairs import PairRenderer, RenderedPair
from simpo_megatron.data.rendered_turns import TEMPLATE_MARK, Spans
from simpo_megatron.data.templates import EndlessTemplateError, bounds_of_templates, chat_template_of, special_texts
from simpo_megatron.data.tokenizer_files import check_tokenizer_files
from simpo_megatron.data.truncation import kept_tokens, princeton_kept_tokens
from simpo_megatron.errors import ConfigError, DataError, SimPOError, StoppedBySignal

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase


_NO_PROBLEMS = (StoppedBySignal, KeyboardInterrupt, SystemExit, GeneratorExit)
_LONGEST_SPECIAL = 1000
# Characters that seldom share a token with the next one.
_BEFORE = "\n:0"


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
        if isinstance(error, _NO_PROBLEMS):
            raise
        reason = _first_line(error)
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
        with _problems_named():
            if self._princeton:
                self._backend = _as_is_backend(tokenizer)
            elif options.chat_template == NO_TEMPLATE:
                self._backend = _as_is_backend(tokenizer, post_processor=None)
            else:
                self._backend = _marked_backend(tokenizer)
        specials = {i: added for i, added in self._backend.get_added_tokens_decoder().items() if added.special}
        self._end_ids = set(specials)
        # Tokenizers cut texts at such special tokens first, so that what stands before one is tokenised on its own.
        self._cut_at_specials = not any(
            added.lstrip or added.single_word or added.normalized for added in specials.values()
        )

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

    def _encode(self, texts: list[str]) -> list:
        with _problems_named():
            return self._backend.encode_batch(texts, add_special_tokens=False)

    def _split_clean(self, pairs: list[RenderedPair]) -> list[tuple]:
        """Returns (prompt, chosen and rejected ids, notes) of each pair, cut where the response begins.

        Ids of context in a response are complements, as `TokenizedPair.marked` has them.
        """
        # What precedes the prompt's last special token is tokenised once for both responses.
        shared = [max(pair.prompt.rfind(TEMPLATE_MARK), 0) if self._cut_at_specials else 0 for pair in pairs]
        encodings = iter(
            self._encode(
                [
                    text
                    for pair, end in zip(pairs, shared, strict=True)
                    for text in (pair.prompt[:end], pair.prompt[end:] + pair.chosen, pair.prompt[end:] + pair.rejected)
                ]
            )
        )
        parts = []
        for pair, end, before, *both in zip(pairs, shared, encodings, encodings, encodings, strict=True):
            start = len(pair.prompt) - end
            cuts = [_token_at(encoding, start) for encoding in both]
            chosen, rejected = (encoding.ids for encoding in both)
            if None in cuts or chosen[: cuts[0]] != rejected[: cuts[1]]:
                parts.append(self._apart(pair))
                continue
            prompt = before.ids + chosen[: cuts[0]]
            if pair.spans is None:
                parts.append((prompt, chosen[cuts[0] :], rejected[cuts[1] :], ()))
            else:
                marked = [_marked_ids(*response, start) for response in zip(both, pair.spans, strict=True)]
                parts.append((prompt, *marked, ()) if None not in marked else self._apart(pair))
        return [(self._one_bos(prompt), self._one_end(c), self._one_end(r), notes) for prompt, c, r, notes in parts]

    def _apart(self, pair: RenderedPair) -> tuple:
        """Returns what `_split_clean` does of one pair, in which a token would straddle a boundary.

        Apart, the ids in front of a boundary are what the model is given at inference.
        """
        [prompt] = (encoding.ids for encoding in self._encode([pair.prompt]))
        responses, notes = [], ["tokenized_apart"]
        texts = pair.chosen, pair.rejected
        for text, spans in zip(texts, pair.spans or [((0, len(text)),) for text in texts], strict=True):
            pieces = list(_pieces(text, spans))
            ids = [encoding.ids for encoding in self._encode([piece for piece, _ in pieces])]
            if self._decode([*prompt, *chain(*ids)]) != pair.prompt + text:
                ids = [self._ids_within(piece, found) for (piece, _), found in zip(pieces, ids, strict=True)]
                if self._decode([*prompt, *chain(*ids)]) != pair.prompt + text:
                    notes.append("text_changed_by_tokenizer")
            of_pieces = zip(pieces, ids, strict=True)
            responses.append([i if is_counted else ~i for (_, is_counted), found in of_pieces for i in found])
        return prompt, *responses, tuple(dict.fromkeys(notes))

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def _ids_within(self, text: str, otherwise: list[int]) -> list[int]:
        """Returns the ids of `text` as it is inside a longer one, where tokenizers put no blank in front of it."""
        for before in _BEFORE:
            [encoding] = self._encode([before + text])
            cut = _token_at(encoding, 1)
            if cut is not None:
                return encoding.ids[cut:]
        return otherwise

    def _split_princeton(self, pairs: list[RenderedPair]) -> list[tuple]:
        """Returns the same as `_split_clean`, by the paper's rule, which tokenises the prompt alone too.

        Source: princeton-nlp/SimPO, scripts/simpo_trainer.py, build_tokenized_answer and tokenize_row.
        """
        texts = [text for p in pairs for text in (p.prompt, p.prompt + p.chosen, p.prompt + p.rejected)]
        encodings = self._encode(texts)
        parts = []
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
            same_prompt = () if prompts[0] == prompts[1] else ("boundary_differs",)
            parts.append((prompts[0], *responses, same_prompt))
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
    with _problems_named():
        backend = _backend_spec(tokenizer)
    identity = {
        "backend": backend,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "chat_template": template and template.identity(),
    }
    # Without a template that was asked for, texts hold special tokens; without one at all, they are mere texts.
    return identity | ({"special_tokens": "in texts"} if options.chat_template == NO_TEMPLATE else {})


@contextmanager
def _problems_named() -> Iterator[None]:
    """Raises errors and panics of the tokenizers library over a strange tokenizer.json as DataError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (SimPOError, *_NO_PROBLEMS)):
            raise
        raise DataError(
            f"tokenizer: found one that cannot be used ({_first_line(error)}), expected the tokenizer of the model"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _backend_spec(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Returns the specification of the tokenizer's Rust part, without truncation and padding, which calls change."""
    return json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}


def _as_is_backend(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Tokenizer:
    """Returns a copy of the tokenizer's Rust part, with `changes` to its components."""
    return tokenizer.backend_tokenizer.__class__.from_str(json.dumps(_backend_spec(tokenizer) | changes))


def _marked_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Returns a copy of the Rust part in which special tokens are matched by TEMPLATE_MARK + their text.

    Text that only looks like a special token is then plain text; everything else, with the merges around it, is
    tokenised as before. The post-processor is removed: it adds nothing here, and byte-level ones trim the offsets.
    """
    spec = _backend_spec(tokenizer)
    names = {token["content"]: TEMPLATE_MARK + token["content"] for token in spec["added_tokens"] if token["special"]}
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    spec["post_processor"] = None
    backend = tokenizer.backend_tokenizer.__class__.from_str(json.dumps(spec))
    for name, marked in names.items():
        assert backend.token_to_id(marked) == tokenizer.backend_tokenizer.token_to_id(name), name
    return backend


def _token_at(encoding: Encoding, start: int) -> int | None:
    """Returns the index of the token that begins at character `start`; None when one reaches across it."""
    token = encoding.char_to_token(start)
    span = None if token is None else encoding.token_to_chars(token)
    return token if span is not None and span[0] == start else None


def _marked_ids(encoding: Encoding, spans: Spans, start: int) -> list[int] | None:
    """Returns the ids behind character `start`, those outside `spans` as complements; None when one is cut in two."""
    first = _token_at(encoding, start)
    marked = [~token_id for token_id in encoding.ids]
    for span in spans:
        begin, end = (_token_at(encoding, start + edge) for edge in span)
        if span is spans[-1]:
            end = len(marked)  # the end of the text
        if begin is None or end is None:
            return None
        marked[begin:end] = encoding.ids[begin:end]
    return marked[first:]


def _pieces(text: str, spans: Spans) -> Iterator[tuple[str, bool]]:
    """Yields the pieces of `text` in order, each with whether it is one of `spans`."""
    last = 0
    for begin, end in spans:
        if begin > last:
            yield text[last:begin], False
        yield text[begin:end], True
        last = end


def _until_last_counted(ids: list[int]) -> list[int]:
    """Returns `ids` without context at their end, which no counted token sees."""
    end = next((place for place in range(len(ids), 0, -1) if ids[place - 1] >= 0), 0)
    return ids[:end]


def use_one_thread() -> None:
    """Keeps the Rust part from starting threads, for processes that are already one of several."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
