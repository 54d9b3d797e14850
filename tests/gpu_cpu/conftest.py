"""Tests of the GPU path without a GPU: kernels run by Triton's interpreter or compiled, tensors on the meta device."""

import os

# Triton reads it when a kernel is defined; kernels that are compiled have processes of their own.
os.environ["TRITON_INTERPRET"] = "1"
