"""Memory that is no longer used goes back to the operating system."""

import platform

import psutil
import pytest

from simpo_megatron.collector import release_memory

BLOCK, NUM_BLOCKS = 50_000, 4_000  # small enough for the heap; 200 MB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this libc is not glibc")
def test_holes_between_blocks_that_live_on_are_given_back():
    process = psutil.Process()
    release_memory()
    before = process.memory_info().rss
    blocks = [b"x" * BLOCK for _ in range(NUM_BLOCKS)]
    living = blocks[:: NUM_BLOCKS // 40]
    del blocks
    release_memory()
    assert process.memory_info().rss - before < len(living) * BLOCK + NUM_BLOCKS * BLOCK / 10
