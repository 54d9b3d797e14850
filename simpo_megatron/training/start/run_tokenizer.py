"""The tokenizer of a run: rank 0 reads it for all, and another rank only where it has to tokenise or decode."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from simpo_megatron.data import PairOptions, chosen_template, load_tokenizer
from simpo_megatron.data.rendering import lacks_template
from simpo_megatron.data.store import digest_of_tokenizer
from simpo_megatron.ranks import on_first_rank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizerFacts:
    """The facts of a tokenizer that a rank needs for pairs that another one has tokenised."""

    digest: str
    """The hash of all that token ids depend on, by which stores are found and a resume compares."""
    pad_id: int
    chat_template: str | None
    """The text of the template that pairs were rendered with, where it is not the tokenizer's own."""
    lacks_template: bool
    """True where conversations are concatenated for want of a template."""


class RunTokenizer:
    """The tokenizer in `folder`, read when it is first asked for.

    Args:
        told: its facts, where another rank has read it.
    """

    def __init__(self, folder: Path, options: PairOptions, told: TokenizerFacts | None = None) -> None:
        self._folder, self._options, self._told = folder, options, told

    @cached_property
    def loaded(self) -> PreTrainedTokenizerBase:
        """The tokenizer itself. Raises: ConfigError, as `load_tokenizer`."""
        return load_tokenizer(self._folder)

    @cached_property
    def own_facts(self) -> TokenizerFacts:
        """The facts of the tokenizer as this rank reads it. Raises: as `loaded`."""
        ids = self.loaded.pad_token_id, self.loaded.eos_token_id, 0
        return TokenizerFacts(
            digest=digest_of_tokenizer(self.loaded, self._options),
            # Any id will do: no response token attends to padding, and no metric counts it.
            pad_id=next(i for i in ids if i is not None),
            chat_template=chosen_template(self.loaded, self._options),
            lacks_template=lacks_template(self.loaded, self._options),
        )

    @property
    def facts(self) -> TokenizerFacts:
        """The facts that rank 0 has told, or else its own."""
        return self._told or self.own_facts


def share_tokenizer(folder: Path, options: PairOptions) -> RunTokenizer:
    """The tokenizer of the run on this rank; rank 0 has read it.

    A tokenizer.json of 11 MiB takes half a second of CPU time and 100 MiB to load, and a second to hash.

    Collectives: those of `on_first_rank`, world.

    Raises: ConfigError, DataError, on every rank alike, when there is none that can be used.
    """
    own = RunTokenizer(folder, options)
    told = on_first_rank(lambda: own.own_facts)
    return own if dist.get_rank() == 0 else RunTokenizer(folder, options, told)
