"""Imports for the ranks of tests, made once per session by multiprocessing's fork server.

Nothing here may start a thread or touch a group of ranks, for neither survives a fork.
"""

import gc

# Modules live as long as the ranks: no search for garbage walks over them, here or in a rank.
gc.disable()

from simpo_megatron.mcore import cpu_patches  # noqa: E402

cpu_patches.install()

import matplotlib.pyplot  # noqa: E402, F401
import transformers.models.llama  # noqa: E402, F401
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402, F401

import simpo_megatron.convert  # noqa: E402
import simpo_megatron.training.loop  # noqa: E402, F401

gc.freeze()
gc.enable()
