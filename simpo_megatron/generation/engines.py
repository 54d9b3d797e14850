"""The engines that answer a prompt: any server that speaks OpenAI's protocol, or transformers in this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo_megatron.data import PairOptions, load_tokenizer
from simpo_megatron.data.records import BadRecord
from simpo_megatron.data.rendering import chat_template_of
from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.generation.prompts import Message
from simpo_megatron.generation.server import ChatServer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str
    num_tokens: int
    is_cut: bool
    """True when it ended at max_new_tokens, not at a stop id."""


class Engine(ABC):
    """A model that answers; `num_at_once` threads may ask it at the same time."""

    num_at_once = 1

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Further facts that determine the answers, as JSON values."""

    @abstractmethod
    def rendered(self, messages: Sequence[Message]) -> str | None:
        """The rendered text of a conversation; None where only the server knows it."""

    def check(self, messages: Sequence[Message], max_new_tokens: int) -> None:
        """Returns where a conversation can be answered.

        Raises: DataError, as `complete` would.
        """
        self.rendered(messages)

    @abstractmethod
    def complete(
        self, messages: Sequence[Message], *, max_new_tokens: int, temperature: float, seed: int
    ) -> Completion:
        """The answer to a conversation that ends with a turn of the user; greedy at temperature 0."""

    def close(self) -> None:  # noqa: B027 - most have started nothing
        """Ends the processes of the engine, which answers no more."""


class ServerEngine(Engine):
    """A model behind a server with OpenAI's protocol (vLLM, SGLang, TGI), which applies template and stop ids."""

    def __init__(self, server: ChatServer, num_at_once: int) -> None:
        self._server, self.num_at_once = server, num_at_once

    def identity(self) -> dict[str, Any]:
        return {"engine": "server", "url": self._server.url, "model": self._server.model}

    def rendered(self, messages: Sequence[Message]) -> None:
        return None

    def complete(
        self, messages: Sequence[Message], *, max_new_tokens: int, temperature: float, seed: int
    ) -> Completion:
        reply = self._server.chat(messages, max_tokens=max_new_tokens, temperature=temperature, seed=seed)
        return Completion(reply.text.strip(), reply.num_tokens, reply.finish_reason == "length")


class FolderEngine(Engine):
    """The model of a Hugging Face folder: its own chat template, one BOS, and its generation_config.json's stop ids."""

    def __init__(self, folder: Path) -> None:
        from simpo_megatron.checkpoint.fingerprint import sampled_fingerprint
        from simpo_megatron.mcore.hf import read_hf_json

        self._tokenizer = load_tokenizer(folder)
        template = chat_template_of(self._tokenizer, PairOptions())
        if template is None:
            raise ConfigError(f"model: found no chat template in {folder}, expected one that renders prompts")
        self._template = template
        self._fingerprint = sampled_fingerprint(folder)
        config = read_hf_json(folder, "config.json")
        self._positions: int | None = config.get("max_position_embeddings")
        if (folder / "generation_config.json").is_file():
            config = read_hf_json(folder, "generation_config.json")
        self._stop_ids = stop_ids(config.get("eos_token_id"))

    def identity(self) -> dict[str, Any]:
        return {"model": self._fingerprint, "stop_ids": self._stop_ids}

    def rendered(self, messages: Sequence[Message]) -> str:
        try:
            return self._template.render([dict(turn) for turn in messages], add_generation_prompt=True)
        except BadRecord as error:
            raise DataError(
                f"prompt: found a conversation that the chat template refuses ({error}), expected one that it takes"
            ) from None

    def check(self, messages: Sequence[Message], max_new_tokens: int) -> None:
        self.prompt_of(messages, max_new_tokens)

    def prompt_of(self, messages: Sequence[Message], max_new_tokens: int) -> list[int]:
        """The prompt's token ids of a conversation.

        Raises: DataError where the model has no positions left for an answer.
        """
        ids = prompt_ids(self._tokenizer, self.rendered(messages))
        if self._positions is not None and len(ids) + max_new_tokens > self._positions:
            raise DataError(
                f"prompt: found {len(ids)} tokens and max_new_tokens {max_new_tokens}, expected at most "
                f"{self._positions} together, the positions of the model; lower max_new_tokens or leave the prompt out"
            )
        return ids

    def completion_of(self, answer: list[int]) -> Completion:
        """The answer of these token ids, which include its stop id."""
        text = str(self._tokenizer.decode(answer, skip_special_tokens=True))
        return Completion(text.strip(), len(answer), is_cut=not answer or answer[-1] not in self._stop_ids)


class TransformersEngine(FolderEngine):
    """A folder's model in this process, on its GPU or the CPU, one answer at a time.

    One at a time, because padding changes an answer's last bits, so that a sampled answer would depend on
    its neighbours.
    """

    def __init__(self, folder: Path, *, dtype: str = "auto") -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        from simpo_megatron.mcore import device
        from simpo_megatron.mcore.hf import load_transformers_model

        super().__init__(folder)
        self._model = load_transformers_model(AutoModelForCausalLM, folder, dtype=dtype)
        self._positions = getattr(self._model.config, "max_position_embeddings", self._positions)
        # Only the stop ids of the folder's own settings; its top_p or repetition_penalty would apply unnoticed.
        pad = next((one for one in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id) if one is not None), 0)
        self._model.generation_config = GenerationConfig(eos_token_id=self._stop_ids or None, pad_token_id=pad)
        if device.has_cuda():
            self._model.to("cuda")

    def identity(self) -> dict[str, Any]:
        dtype = str(self._model.dtype).removeprefix("torch.")
        return {"engine": "transformers", **super().identity(), "dtype": dtype}

    def complete(
        self, messages: Sequence[Message], *, max_new_tokens: int, temperature: float, seed: int
    ) -> Completion:
        import torch

        ids = self.prompt_of(messages, max_new_tokens)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        torch.manual_seed(seed)
        inputs = torch.tensor([ids], device=self._model.device)
        with torch.inference_mode():
            output = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                **sampling,
            )
        return self.completion_of(output[0, len(ids) :].tolist())


def stop_ids(configured: int | Sequence[int] | None) -> list[int]:
    """The ids of a generation_config.json at which an answer ends.

    Raises: ConfigError when they are not ids.
    """
    ids = configured if isinstance(configured, Sequence) else [] if configured is None else [configured]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise ConfigError(f"generation_config.json: eos_token_id: found {configured!r}, expected an id or several")
    return list(ids)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """The token ids of a rendered prompt.

    Raises: DataError where it begins with two BOS, or with none although the tokenizer adds one to every text.
    """
    # Without transformers' warning of a long text: what is too long for the model is an error, which names the prompt.
    ids: list[int] = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    num_bos = next((place for place, token in enumerate(ids) if token != bos), len(ids))
    wants_one = tokenizer("a")["input_ids"][:1] == [bos]
    if num_bos > 1 or (wants_one and num_bos != 1):
        raise DataError(
            f"prompt: found {num_bos} BOS tokens ({tokenizer.bos_token}) at its beginning, expected one; mend the chat "
            "template"
        )
    return ids
