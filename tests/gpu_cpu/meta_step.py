"""Training microbatches on the meta device as if it were a GPU; one JSON line a case says what the GPU would be asked.

    meta_step.py FOLDER     FOLDER/job.json: {case: {"model": shape, "options": ..., "stage": ..., "pairs": lengths}}

Where megatron's dispatcher of an MoE waits for its counts, it is listed, and gets even ones.

A case may `plant` what must not be, one of PLANTS. A `check` is gpu-check's own model, at the size of a GPU.

The model is megatron's own on local layers, under its DDP, the ranks' peers are played by torch's fake backend. What
makes the host wait for a GPU cannot be done with a tensor of the meta device and raises: item, tolist, bool, nonzero, a
copy to the CPU. Copies from the host are listed, operations that launch a kernel counted.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from counting import NO_KERNEL, norms_of_a_gpu
from counting import Counter as Operations
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")

torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: META
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda *_: (9, 0)
# A generator of the CPU in the place of CUDA's, whose state the host keeps as well.
torch.cuda.manual_seed = torch.manual_seed
torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
# Counts bytes where a case asks for them.
work: Operations | None = None


def compiled(function: Any = None, **_: Any) -> Any:
    """The place of torch.compile, which would leave the count to the compiler: one launch where bytes are counted."""
    if function is None:
        return compiled

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if work is None else work.as_one(function, *args, **kwargs)

    return call


torch.compile = compiled

from simpo_megatron.mcore import cpu_patches, device  # noqa: E402

device.current_device = lambda: META
for _name in ("Stream", "Event", "current_stream"):
    setattr(torch.cuda, _name, cpu_patches._NullStream)
torch.cuda.stream = lambda *_: nullcontext()
cpu_patches.install()
cpu_patches._replace_random_state()

from megatron.core.transformer.moe import token_dispatcher  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from simpo_megatron import parallel  # noqa: E402
from simpo_megatron.config import Config, config_from  # noqa: E402
from simpo_megatron.data import BatchOptions, PreferenceBatch, TokenizedPair, collate  # noqa: E402
from simpo_megatron.gpu_check.small_model import microbatch_of, random_model, random_pairs  # noqa: E402
from simpo_megatron.gpu_check.verdict import CheckSetting  # noqa: E402
from simpo_megatron.mcore.families import describe_hf_model  # noqa: E402
from simpo_megatron.mcore.forward_step import ForwardStep  # noqa: E402
from simpo_megatron.mcore.microbatch import Microbatch, output_of, to_microbatch  # noqa: E402
from simpo_megatron.mcore.model import build_model, wrap_in_ddp  # noqa: E402
from simpo_megatron.parallel import ParallelGroups  # noqa: E402


class Asked(TorchDispatchMode):
    """Lists what comes from the host and counts kernels and collectives, while the context lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[dict] = []
        self.operations: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()

    def __enter__(self) -> Asked:
        # What these make of numbers is copied to a GPU, and waited for; the meta device takes none.
        self._makers = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}
        for name, maker in self._makers.items():
            setattr(torch, name, self._noted(maker))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, maker in self._makers.items():
            setattr(torch, name, maker)

    def _noted(self, maker: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            made = maker(*args, **kwargs)
            if made.is_meta and not (isinstance(args[0], Tensor) and args[0].is_meta):
                self.copies.append({"where": place(), "shape": list(made.shape), "waits": True})
            return made

        return make

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.removesuffix(".default")
        kind = name.split(".")[0]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not any(tensor.is_meta for tensor in inputs + outputs):
            return result
        # A CPU tensor without dimensions is a number, which a kernel takes as an argument.
        is_copy = kind in ("_to_copy", "copy_")
        sent = [x for x in inputs if not x.is_meta and (is_copy or x.dim())]
        if sent:
            waits = not ((kwargs or {}).get("non_blocking") or (kind == "copy_" and len(args) > 2 and args[2]))
            self.copies.append({"where": place(), "shape": list(sent[0].shape), "waits": waits})
        elif func.namespace == "c10d":
            self.collectives[name] += 1
        elif kind not in NO_KERNEL:
            self.operations[name] += 1
        return result


def place() -> str:
    """The innermost line of ours or of megatron's that led here."""
    ours = [f for f in traceback.extract_stack() if "/simpo_megatron/" in f.filename or "/megatron/" in f.filename]
    return f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else "elsewhere"


@contextmanager
def even_routing(num_routed: int) -> Iterator[list[str]]:
    """While the context lasts, experts get equally many tokens; yields where the host waited to be told."""
    waits: list[str] = []

    def counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_meta:
            return tensor
        waits.append(place())
        told = torch.full(tensor.shape, num_routed // tensor.numel())
        assert told.sum() == num_routed, "a test routes numbers that the experts divide"
        return told.numpy() if as_numpy else told

    def chosen(self: Tensor, mask: Tensor) -> Tensor:
        waits.append(place())
        return self.flatten()[:num_routed]

    before = token_dispatcher.maybe_move_tensor_to_cpu, Tensor.masked_select
    token_dispatcher.maybe_move_tensor_to_cpu, Tensor.masked_select = counts, chosen
    try:
        yield waits
    finally:
        token_dispatcher.maybe_move_tensor_to_cpu, Tensor.masked_select = before


# What the tests plant, to see it found.
PLANTS = {
    None: lambda tensor: None,
    "a number": lambda tensor: torch.tensor(3, device=META),
    "a tensor": lambda tensor: torch.arange(3).to(META, non_blocking=True),
    "an index": lambda tensor: tensor[:, torch.arange(3)],
    "a wait": lambda tensor: int(tensor.max()),
    "a question": lambda tensor: tensor.nonzero(),
}


def batch_of(lengths: list[list[int]], options: BatchOptions) -> PreferenceBatch:
    random = np.random.default_rng(0)
    pairs = [TokenizedPair(*(random.integers(0, 90, size=n).astype(np.int32) for n in pair)) for pair in lengths]
    return collate(pairs, range(len(pairs)), options)


def chunk_of(folder: Path, config: Config, groups: ParallelGroups) -> torch.nn.Module:
    description = describe_hf_model(folder)
    (chunk,) = wrap_in_ddp(build_model(description, config, groups), config)
    return chunk


def play(folder: Path, case: dict) -> dict:
    """The operations of one forward and backward pass of a microbatch on a rank of `case`."""
    global work
    kind = case.get("kind", "llama")
    of_model = AutoConfig.for_model(kind, architectures=[f"{kind.title()}ForCausalLM"], **case["model"])
    of_model.save_pretrained(folder)
    config = config_from(model=str(folder), data=("pairs",), **case["options"])
    sizes, stage = config.parallel.sizes, case.get("stage", 0)
    # Ranks of one stage stand together.
    first_of_stage = stage * sizes.tensor * sizes.context
    dist.init_process_group("fake", store=FakeStore(), rank=first_of_stage, world_size=sizes.model)
    try:
        groups = parallel.initialize(sizes, backend="fake")
        parallel.seed_everything(1)
        chunk = chunk_of(folder, config, groups)
        batch = batch_of(case["pairs"], BatchOptions(**case["batch"]))
        with Asked() as transfer:
            microbatch = to_microbatch(batch, META, cp_group=groups.cp)
        work = Operations() if case.get("counts_work") else None
        num_rows = microbatch.tokens_BS.numel() // (sizes.tensor if config.parallel.sequence_parallel else 1)
        routed = even_routing(num_rows * getattr(of_model, "num_experts_per_tok", 0))
        with routed as waits, norms_of_a_gpu(), Asked() as forward, work or nullcontext():
            PLANTS[case.get("plant")](microbatch.tokens_BS)
            output = run(chunk, microbatch, config, is_last=groups.is_last_stage, is_first=groups.is_first_stage)
        with norms_of_a_gpu(), Asked() as backward, work or nullcontext():
            output.backward(torch.empty_like(output))
        return {
            "transfers": transfer.copies,
            "to_microbatch": transfer.operations,
            "copies": forward.copies + backward.copies,
            "forward": forward.operations,
            "backward": backward.operations,
            "waits": waits,
            "collectives": forward.collectives + backward.collectives,
            "work": work.operations if work else [],
            "tokens": batch.num_tokens,
            "segments": len(microbatch.layout.segments or ()),
            "kernels": device.kernels(bf16=True),
        }
    finally:
        parallel.shut_down()


class OnMeta(CheckSetting):
    """The setting of a check on a GPU, with the meta device in its place."""

    device = META


def play_check() -> dict:
    """The second pass through gpu-check's own model, and what it asked; the first one may ask for anything."""
    device.backend = lambda: "fake"
    setting = OnMeta(folder=Path(), log=Path())
    with norms_of_a_gpu(), random_model(setting, bf16=True) as model:
        pack = microbatch_of(random_pairs(setting, 8, 300), setting)
        output_of(model, pack).sum().backward()
        with Asked() as asked:
            output_of(model, pack).sum().backward()
    return {"copies": asked.copies, "forward": asked.operations}


def run(chunk: torch.nn.Module, microbatch: Microbatch, config: Config, *, is_last: bool, is_first: bool) -> Tensor:
    if not is_first:
        rows, length = microbatch.tokens_BS.shape
        length //= config.parallel.sizes.tensor if config.parallel.sequence_parallel else 1
        shape = length, rows, chunk.module.config.hidden_size
        received = torch.empty(shape, dtype=torch.bfloat16, device=META, requires_grad=True)
        chunk.module.set_input_tensor(received)
    step = ForwardStep(objective=config.objective, pairs_per_chosen_token=1.0)
    output, loss = step(iter([microbatch]), chunk)
    return loss(output)[0] if is_last else output


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for name, the_case in json.loads((target / "job.json").read_text()).items():
        try:
            found = play_check() if the_case.get("check") else play(target / "model", the_case)
        except Exception as error:  # what a tensor of the meta device cannot do, a GPU waits for
            found = {"raised": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": name, **found}), flush=True)
