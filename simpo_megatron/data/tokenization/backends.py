"""Backends: copies of a tokenizer's Rust part, with special tokens as a run needs them, and what their ids show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from simpo_megatron.data.records import TEMPLATE_MARK
from simpo_megatron.errors import DataError, SimPOError, StoppedBySignal

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

# Pre-tokenizers that cut a text into pieces, and lose or add nothing.
_CUTTING = frozenset({"Split", "Digits", "Punctuation", "ByteLevel"})

NO_PROBLEMS = (StoppedBySignal, KeyboardInterrupt, SystemExit, GeneratorExit)
"""Errors that end a process, and say nothing about a tokenizer."""


def encode(backend: Tokenizer, texts: list[str]) -> list[Encoding]:
    """Returns the encoding of each text, no special token added. Raises: DataError, as `problems_named`."""
    with problems_named():
        return backend.encode_batch(texts, add_special_tokens=False)


@contextmanager
def problems_named() -> Iterator[None]:
    """Raises errors and panics of the tokenizers library over a strange tokenizer.json as DataError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (SimPOError, *NO_PROBLEMS)):
            raise
        raise DataError(
            f"tokenizer: found one that cannot be used ({first_line(error)}), expected the tokenizer of the model"
        ) from None


def first_line(error: BaseException) -> str:
    """Returns the first line that an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def backend_spec(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Returns the specification of the tokenizer's Rust part, without truncation and padding, which calls change."""
    return json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}


def as_is_backend(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Tokenizer:
    """Returns a copy of the tokenizer's Rust part, with `changes` to its components."""
    return tokenizer.backend_tokenizer.__class__.from_str(json.dumps(backend_spec(tokenizer) | changes))


def marked_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Returns a copy of the Rust part in which special tokens are matched by TEMPLATE_MARK + their text.

    Text that only looks like a special token is then plain text; everything else, with the merges around it, is
    tokenised as before. The post-processor is removed: it adds nothing here, and byte-level ones trim the offsets.
    """
    spec = backend_spec(tokenizer)
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


def has_byte_tokens(backend: Tokenizer) -> bool:
    """Returns whether each token stands for some bytes of a text, always the same, and no byte is lost or added.

    So it is with byte-level BPE. Ids that begin as those of a text then cover exactly the bytes of that text.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    spec = json.loads(backend.to_str())
    model, cutter = spec["model"], spec["pre_tokenizer"] or {}
    cutters = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    return (
        model["type"] == "BPE"
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and model["vocab"].keys() >= set(ByteLevel.alphabet())
        and spec["normalizer"] is None
        and any(found.get("type") == "ByteLevel" for found in cutters)
        and all(found.get("type") in _CUTTING and not found.get("add_prefix_space") for found in cutters)
        and not any(found.get("behavior") == "Removed" for found in cutters)
        and not any(token[key] for token in spec["added_tokens"] for key in ("lstrip", "rstrip", "single_word"))
    )
