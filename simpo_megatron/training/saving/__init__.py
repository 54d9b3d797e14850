"""Checkpoints of a run: when it saves, which one it resumes from, and what its monitors remember."""

from simpo_megatron.training.saving.checkpoint_manager import Saver
from simpo_megatron.training.saving.monitor_memory import (
    CHOSEN,
    LINES,
    NUM_SKIPPED,
    PAIRS,
    REPETITION_AT_START,
    START,
    TOLD,
)
from simpo_megatron.training.saving.resume import (
    Start,
    continuing,
    find_checkpoint,
    held_run_folder,
    how_to_continue,
    start_run,
)
from simpo_megatron.training.saving.save_schedule import SaveSchedule

__all__ = [
    "CHOSEN",
    "LINES",
    "NUM_SKIPPED",
    "PAIRS",
    "REPETITION_AT_START",
    "START",
    "TOLD",
    "SaveSchedule",
    "Saver",
    "Start",
    "continuing",
    "find_checkpoint",
    "held_run_folder",
    "how_to_continue",
    "start_run",
]
