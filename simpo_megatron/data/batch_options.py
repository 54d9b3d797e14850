"""Options of the batches of a step, each with its default and its meaning; nothing here needs torch or numpy."""

from dataclasses import dataclass

from simpo_megatron.errors import require, require_positive
from simpo_megatron.option_field import option


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Pairs per optimizer step and per microbatch."""

    global_batch_size: int = option(
        128, "Pairs per optimizer step over all ranks. The authors keep it at 128.", everyday=True
    )
    packing: bool = option(
        True, "Pack pairs without padding up to tokens_per_microbatch; else micro_batch_size pairs per microbatch."
    )
    prefix_sharing: bool = option(True, "Compute the prompt of a pair once for both responses.")
    tokens_per_microbatch: int = option(8192, "Most tokens of a packed microbatch. Padding counts.", everyday=True)
    fixed_pack_length: bool = option(
        False,
        "Pad every pack to tokens_per_microbatch; without it packs are padded only under pipelines, to the longest "
        "one of their step.",
    )
    micro_batch_size: int = option(1, "Pairs per microbatch with --no-packing.")

    def __post_init__(self) -> None:
        require_positive(self, "global_batch_size", "tokens_per_microbatch", "micro_batch_size")
        require(
            self.packing or not self.fixed_pack_length,
            "fixed_pack_length",
            True,
            "packing with it; padded rows have no largest number of tokens",
        )


@dataclass(frozen=True, kw_only=True)
class BatchOptions(BatchConfig):
    """`BatchConfig` with what follows from the layout, the tokenizer and the run's seed."""

    sequence_multiple: int = 1
    """Rows are padded to a multiple of this many tokens (tensor parallel size under sequence parallelism; 16
    for FP8)."""
    one_shape_per_step: bool = False
    """All microbatches of a step are padded to one shape, which pipeline stages then know without asking."""
    pad_id: int = 0
    """Token id of padding; it reaches no response token and no sum."""
    seed: int = 42
    """Seed of the order of pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "sequence_multiple")
        require(self.pad_id >= 0, "pad_id", self.pad_id, "a token id")
        require(
            not self.packing or self.tokens_per_microbatch % self.sequence_multiple == 0,
            "tokens_per_microbatch",
            self.tokens_per_microbatch,
            f"a multiple of {self.sequence_multiple}, to which sequence and context parallelism and FP8 pad",
        )


def check_global_batch_size(global_batch_size: int, *, dp_size: int, microbatch_multiple: int = 1) -> None:
    """Raises ConfigError when a step has fewer pairs than its ranks have microbatches."""
    fewest = dp_size * microbatch_multiple
    require(
        global_batch_size >= fewest,
        "global_batch_size",
        global_batch_size,
        f"at least {fewest}: one pair for each of {dp_size} data-parallel ranks x {microbatch_multiple} microbatches",
    )
