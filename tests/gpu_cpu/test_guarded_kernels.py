"""The check that the loss's kernels write into their tensors alone, and that it finds one that does not."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed; make test-gpu-cpu has it")

from simpo_megatron.gpu_check import memcheck
from simpo_megatron.loss import row_kernels


def test_neither_kernel_writes_outside():
    assert memcheck.outside("cpu") == []


def test_a_write_into_the_row_behind_is_found(monkeypatch):
    real = row_kernels.slopes

    def one_too_many(logits, out, *arguments):
        real(logits, out, *arguments)
        out.as_strided((1,), (1,), out.storage_offset() + len(out) * out.stride(0)).zero_()

    monkeypatch.setattr(row_kernels, "slopes", one_too_many)
    found = memcheck.outside("cpu")
    assert len(found) == 12 and all("slopes wrote outside" in fault for fault in found)


def test_another_sum_is_found(monkeypatch):
    monkeypatch.setattr(row_kernels, "row_stats", lambda *arguments: None)
    assert all("row_stats wrote another sum" in fault for fault in memcheck.outside("cpu"))
