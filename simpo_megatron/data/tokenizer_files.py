"""Files of a tokenizer in a Hugging Face folder: which they are, and whether each can be read at once."""

from __future__ import annotations

from pathlib import Path

from simpo_megatron.errors import ConfigError
from simpo_megatron.limits import check_plain

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""Patterns of their names."""

_WITH_TOKENS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")

MAX_TOKENIZER_BYTES = 256 << 20
"""Size of the largest such file that is read; a vocabulary of 256,000 tokens has 34 MB."""


def check_tokenizer_files(folder: Path) -> None:
    """Returns if `folder` has a tokenizer's files, each of them a file; its reader would pass over most that are none.

    Raises: ConfigError: there is none that holds tokens, or one is a folder, a pipe, a link to nothing, empty, or
        larger than MAX_TOKENIZER_BYTES.
    """
    entries = [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]
    for path in sorted(entries):
        if any(path.match(pattern) for pattern in ("config.json", *TOKENIZER_FILES)):
            try:
                check_plain(path, MAX_TOKENIZER_BYTES)
                problem = None if path.stat().st_size else "it is empty"
            except OSError as error:
                problem = error.strerror
            if problem is not None:
                raise ConfigError(
                    f"{path}: cannot be read ({problem}), expected a file of the tokenizer; replace or remove it"
                )
    if not any(path.match(pattern) for path in entries for pattern in _WITH_TOKENS):
        raise ConfigError(
            f"model: found no tokenizer in {folder} (no {', no '.join(_WITH_TOKENS)}), expected one that transformers "
            "loads"
        )
