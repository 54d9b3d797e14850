"""Token ids of rendered pairs, cut where the responses begin: by offsets, by ids alone, or by encoding texts apart."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from simpo_megatron.data.bounded_dict import BoundedDict
from simpo_megatron.data.records import TEMPLATE_MARK
from simpo_megatron.data.rendering import RenderedPair, Spans
from simpo_megatron.data.tokenization.backends import encode, has_byte_tokens, problems_named

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

SplitPair = tuple[list[int], list[int], list[int], tuple[str, ...]]
"""Prompt, chosen and rejected ids, and notes. Ids of context are complements, as `TokenizedPair.marked` has them."""

# Characters that seldom share a token with the next one.
_BEFORE = "\n:0"
# Headers of templates are short; others are not worth keeping.
_LONGEST_HEADER = 100


class PairSplitter:
    """Encodes rendered pairs and cuts their ids where the responses begin."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        # Tokenizers cut texts at such special tokens first, so that what stands before one is tokenised on its own.
        self._cut_at_specials = not any(
            token.special and (token.lstrip or token.single_word or token.normalized)
            for token in backend.get_added_tokens_decoder().values()
        )
        self._has_byte_tokens = self._cut_at_specials and has_byte_tokens(backend)
        self._headers: BoundedDict[str, list[int]] = BoundedDict()

    def split(self, pairs: list[RenderedPair]) -> list[SplitPair]:
        """Returns the ids of each pair."""
        # What precedes the prompt's last special token is tokenised once for both responses.
        shared = [max(pair.prompt.rfind(TEMPLATE_MARK), 0) if self._cut_at_specials else 0 for pair in pairs]
        parts = self._split_behind_headers(pairs, shared) if self._has_byte_tokens else [None] * len(pairs)
        left = [index for index, part in enumerate(parts) if part is None]
        by_offsets = iter(self._split_by_offsets([pairs[index] for index in left], [shared[index] for index in left]))
        return [next(by_offsets) if part is None else part for part in parts]

    def _split_behind_headers(self, pairs: list[RenderedPair], shared: list[int]) -> list[SplitPair | None]:
        """Returns the same as `_split_by_offsets`, faster; None where ids alone do not show a boundary.

        They do where both responses' ids begin with those of the header alone, which is the prompt's last special token
        with the text behind it.
        """
        headers = [
            pair.prompt[end:] if end and pair.spans is None and len(pair.prompt) - end <= _LONGEST_HEADER else ""
            for pair, end in zip(pairs, shared, strict=True)
        ]
        texts = [
            text
            for pair, end, header in zip(pairs, shared, headers, strict=True)
            if header
            for text in (pair.prompt[:end], header + pair.chosen, header + pair.rejected)
        ]
        with problems_named():
            encodings = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        parts: list[SplitPair | None] = []
        for header in headers:
            if not header:
                parts.append(None)
                continue
            before, chosen, rejected = next(encodings).ids, next(encodings).ids, next(encodings).ids
            ids = self._ids_of_header(header)
            is_shown = chosen[: len(ids)] == ids == rejected[: len(ids)]
            parts.append((before + ids, chosen[len(ids) :], rejected[len(ids) :], ()) if is_shown else None)
        return parts

    def _ids_of_header(self, header: str) -> list[int]:
        if header not in self._headers:
            [encoding] = encode(self._backend, [header])
            self._headers[header] = encoding.ids
        return self._headers[header]

    def _split_by_offsets(self, pairs: list[RenderedPair], shared: list[int]) -> list[SplitPair]:
        """Returns what `split` does, by the place in the text of the token that begins a response."""
        encodings = iter(
            encode(
                self._backend,
                [
                    text
                    for pair, end in zip(pairs, shared, strict=True)
                    for text in (pair.prompt[:end], pair.prompt[end:] + pair.chosen, pair.prompt[end:] + pair.rejected)
                ],
            )
        )
        parts: list[SplitPair] = []
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
                of_chosen, of_rejected = (
                    _marked_ids(*response, start) for response in zip(both, pair.spans, strict=True)
                )
                if of_chosen is None or of_rejected is None:
                    parts.append(self._apart(pair))
                else:
                    parts.append((prompt, of_chosen, of_rejected, ()))
        return parts

    def _apart(self, pair: RenderedPair) -> SplitPair:
        """Returns what `split` does of one pair, in which a token would straddle a boundary.

        Apart, the ids in front of a boundary are what the model is given at inference.
        """
        [prompt] = (encoding.ids for encoding in encode(self._backend, [pair.prompt]))
        responses: list[list[int]] = []
        notes = ["tokenized_apart"]
        texts = pair.chosen, pair.rejected
        for text, spans in zip(texts, pair.spans or [((0, len(text)),) for text in texts], strict=True):
            pieces = list(_pieces(text, spans))
            ids = [encoding.ids for encoding in encode(self._backend, [piece for piece, _ in pieces])]
            if self._decode([*prompt, *chain(*ids)]) != pair.prompt + text:
                ids = [self._ids_within(piece, found) for (piece, _), found in zip(pieces, ids, strict=True)]
                if self._decode([*prompt, *chain(*ids)]) != pair.prompt + text:
                    notes.append("text_changed_by_tokenizer")
            of_pieces = zip(pieces, ids, strict=True)
            responses.append([i if is_counted else ~i for (_, is_counted), found in of_pieces for i in found])
        chosen, rejected = responses
        return prompt, chosen, rejected, tuple(dict.fromkeys(notes))

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def _ids_within(self, text: str, otherwise: list[int]) -> list[int]:
        """Returns the ids of `text` as it is inside a longer one, where tokenizers put no blank in front of it."""
        for before in _BEFORE:
            [encoding] = encode(self._backend, [before + text])
            cut = _token_at(encoding, 1)
            if cut is not None:
                return encoding.ids[cut:]
        return otherwise


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
