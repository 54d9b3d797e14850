"""A microbatch on the ranks of a model: read by one, sent to the others, copied to the device, and laid out.

The layout says which rows a rank holds, which tokens see which, and at which positions. Attention and megatron's
layers read it.
"""

from simpo_megatron.mcore.microbatch.batch import Microbatch, output_of, read_pairs, to_microbatch
from simpo_megatron.mcore.microbatch.layout import MicrobatchLayout, Segment
from simpo_megatron.mcore.microbatch.transfer import copied_together

__all__ = [
    "Microbatch",
    "MicrobatchLayout",
    "Segment",
    "copied_together",
    "output_of",
    "read_pairs",
    "to_microbatch",
]
