"""A folder's model under vLLM, in processes of vLLM's own environment, one for each replica."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from simpo_megatron.errors import DataError, require
from simpo_megatron.generation.engines import Completion, FolderEngine
from simpo_megatron.generation.prompts import Message
from simpo_megatron.generation.vllm_environment import vllm_python

_CHILD = Path(__file__).with_name("vllm_child.py")
_AT_ONCE_PER_REPLICA = 512
_RAISED = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception): .*")


class VllmEngine(FolderEngine):
    """A folder's model under vLLM's offline engine, which batches prompts continuously.

    vLLM gets token ids: template, BOS and stop ids are those of the other engines, and its tokenizer is not
    loaded. Greedy answers may differ from transformers' where two tokens are equally probable to the last bits.

    Args:
        log: file for vLLM's own output.
        tensor_parallel_size: GPUs that share one replica's weights.
        data_parallel_size: replicas, each on GPUs of its own.
        gpu_memory_utilization: share of a GPU's memory that vLLM takes, on a CPU of the machine's; None is its default.
    """

    def __init__(
        self,
        folder: Path,
        log: Path,
        *,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        gpu_memory_utilization: float | None = None,
    ) -> None:
        require(tensor_parallel_size > 0, "tp", tensor_parallel_size, "a number above 0")
        require(data_parallel_size > 0, "dp", data_parallel_size, "a number above 0")
        share = gpu_memory_utilization
        require(share is None or 0 < share <= 1, "gpu_memory_utilization", share, "a share above 0 and at most 1")
        python = vllm_python()
        super().__init__(folder)
        self._dtype, self._tensor_parallel_size = dtype, tensor_parallel_size
        self.num_at_once = _AT_ONCE_PER_REPLICA * data_parallel_size
        engine_args = {
            "model": str(folder.absolute()),
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel_size,
            "skip_tokenizer_init": True,
            # The folder's top_p or repetition_penalty would apply unnoticed.
            "generation_config": "vllm",
            **({} if share is None else {"gpu_memory_utilization": share}),
        }
        log.parent.mkdir(parents=True, exist_ok=True)
        devices = [_devices(number, tensor_parallel_size, data_parallel_size) for number in range(data_parallel_size)]
        self._choosing = threading.Lock()
        self._replicas = [_Replica(python, engine_args, log, own) for own in devices]
        versions = [replica.version() for replica in self._replicas]
        self._version = versions[0]

    def identity(self) -> dict[str, Any]:
        return {
            "engine": f"vllm {self._version}",
            **super().identity(),
            "dtype": self._dtype,
            "tensor_parallel_size": self._tensor_parallel_size,
        }

    def complete(
        self, messages: Sequence[Message], *, max_new_tokens: int, temperature: float, seed: int
    ) -> Completion:
        sampling = {
            "temperature": temperature,
            "max_tokens": max_new_tokens,
            "seed": seed,
            "stop_token_ids": self._stop_ids,
            "detokenize": False,
        }
        prompt = self.prompt_of(messages, max_new_tokens)
        with self._choosing:  # or threads that ask at once would all find the same one idle
            replica = min(self._replicas, key=lambda one: (one.num_open, one.num_asked))
            asked = replica.ask(prompt, sampling)
        return self.completion_of(asked.result())

    def close(self) -> None:
        for replica in self._replicas:
            replica.close()


class _Replica:
    """One process of vLLM."""

    def __init__(self, python: Path, engine_args: Mapping[str, Any], log: Path, devices: str | None) -> None:
        self._log = log
        self.num_asked = 0
        """The number of requests so far."""
        self._open: dict[str, Future[list[int]]] = {}
        self._started: Future[str] = Future()
        replies, reply_end = os.pipe()
        variables = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
        with log.open("ab") as output:
            self._log_begun = output.tell()
            self._process = subprocess.Popen(  # noqa: S603 - the user's own environment
                [python, _CHILD, str(reply_end), json.dumps(engine_args)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(reply_end,),
                env={**os.environ, **variables},
                text=True,
            )
        os.close(reply_end)
        threading.Thread(target=self._read, args=(replies,), daemon=True).start()

    @property
    def num_open(self) -> int:
        """The number of requests without an answer."""
        return len(self._open)

    def version(self) -> str:
        """The version of vLLM, once the model is loaded.

        Raises: DataError where it did not start.
        """
        return self._started.result()

    def ask(self, prompt: Sequence[int], sampling: Mapping[str, Any]) -> Future[list[int]]:
        """The token ids of an answer, once it is there.

        Raises: DataError where the process has ended.
        """
        asked: Future[list[int]] = Future()
        name = str(self.num_asked)
        self.num_asked += 1
        self._open[name] = asked
        line = json.dumps({"id": name, "prompt_token_ids": list(prompt), "sampling": sampling})
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        return asked

    def close(self) -> None:
        """Closes the process's stdin, which ends it."""
        assert self._process.stdin is not None
        # A process that has ended may have left a request unread.
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read(self, replies: int) -> None:
        """Gives out answers until the process ends; then every waiting request gets the error."""
        with open(replies, encoding="utf-8") as file:
            for line in file:
                reply = json.loads(line)
                if "version" in reply:
                    self._started.set_result(reply["version"])
                elif "error" in reply:
                    self._open.pop(reply["id"]).set_exception(DataError(f"prompt: found {reply['error']}, by vLLM"))
                else:
                    self._open.pop(reply["id"]).set_result(reply["token_ids"])
        self._process.wait()
        waiting: list[Future[Any]] = [self._started, *self._open.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(self._ended())

    def _ended(self) -> DataError:
        # Its stdin is closed before it has ended, and its last words may still be on their way.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)
        with self._log.open("rb") as output:
            output.seek(self._log_begun)
            said = output.read().decode(errors="replace").strip().splitlines()
        return DataError(
            f"vllm: found its process ended with {self._process.poll()} ({_cause(said)}), expected answers; "
            f"{self._log} has its output"
        )


def _cause(lines: Sequence[str]) -> str:
    """The last line; where vLLM's processes say that another one failed, the last exception that is not theirs."""
    last = lines[-1] if lines else "nothing"
    raised = [found[0] for line in lines if (found := _RAISED.search(line)) and "root cause" not in found[0]]
    return raised[-1] if raised and any("root cause" in line for line in lines) else last


def _devices(replica: int, tensor_parallel_size: int, data_parallel_size: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of one of several replicas; None for a single one, which uses all GPUs."""
    if data_parallel_size == 1:
        return None
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(number) for number in range(tensor_parallel_size * data_parallel_size)]
    own = names[replica * tensor_parallel_size :][:tensor_parallel_size]
    require(
        len(own) == tensor_parallel_size,
        "dp",
        data_parallel_size,
        f"tp x dp GPUs, {tensor_parallel_size * data_parallel_size}, in CUDA_VISIBLE_DEVICES {seen}",
    )
    return ",".join(own)
