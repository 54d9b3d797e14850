"""Compiles the loss's kernels for a GPU that is not here, and prints what came out: one JSON line a kernel."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simpo_megatron.loss import row_kernels

POINTERS = {"logits": "*{dtype}", "out": "*bf16", "targets": "*i64"}
NUMBERS = {"stride", "out_stride", "first_id", "num_rows"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(kernel, dtype: str, capability: int, width: int, cap: float) -> dict:
    """Registers, spills and memory instructions of a kernel."""
    constants = {
        "WIDTH": width,
        "CAP": cap,
        "BLOCK": row_kernels.columns_at_once(width),
    }
    names = list(kernel.arg_names)
    signature = {}
    for name in names:
        if name.isupper():
            signature[name] = "constexpr"
        elif name in NUMBERS:
            signature[name] = "i32"
        else:
            signature[name] = POINTERS.get(name, "*fp32").format(dtype=dtype)
    # Triton marks by itself, at a launch, the pointers and strides that 16 divides; those of a block are such.
    marked = [n for n in names if not n.isupper() and n not in kernel.do_not_specialize]
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in marked}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items() if n in names},
        attrs=aligned,
    )
    done = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": row_kernels._NUM_WARPS}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    counts = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    memory = re.findall(r"(?:ld|st)\.global[.\w:]*", done.asm["ptx"])
    return {
        "kernel": kernel.__name__,
        "dtype": dtype,
        "capability": capability,
        "cap": cap,
        **counts,
        "wide": sum(".v4.b32" in name or ".v2.b64" in name for name in memory),
        "memory": sorted(set(memory)),
    }


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for dtype in ("bf16", "fp32"):
            for cap in (0.0, 30.0):
                for kernel in (row_kernels._row_stats, row_kernels._slopes):
                    print(json.dumps(compiled(kernel, dtype, capability, 16032, cap)), flush=True)
