"""The embedded demo: bundled preference pairs and a tiny random model, ready in seconds, offline."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from simpo_megatron.atomic import new_folder
from simpo_megatron.errors import StoppedBySignal

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

VOCAB_SIZE = 1003
"""Odd on purpose: it divides over no number of ranks, so that every run pads it."""

MAX_LENGTH = 512
"""Positions of the model, in tokens; the longest demonstration answer ends at about 100."""


@dataclass(frozen=True)
class DemoAssets:
    """Paths of the demo's model and pairs."""

    model_dir: Path
    train_file: Path
    valid_file: Path
    """Pairs about topics that `train_file` never mentions."""


def demo_version() -> str:
    """Hex digits that change with the files `prepare_demo` writes: folders may outlive a version of this package."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update((Path(__file__).parent / "pairs.jsonl").read_bytes())
    return digest.hexdigest()[:12]


def demo_files(folder: str | Path) -> DemoAssets:
    """The paths of a demo in `folder`, where its model may not be written yet."""
    bundled = Path(__file__).parent
    return DemoAssets(Path(folder) / "tiny-llama", bundled / "pairs.jsonl", bundled / "validation_pairs.jsonl")


def prepare_demo(folder: str | Path) -> DemoAssets:
    """The bundled preference pairs, and the demo's model, written to `folder` unless it is there.

    Safe to call from several processes at once: each writes the same model to a draft, and one rename wins.

    Raises: OSError when it cannot be written.
    """
    assets = demo_files(folder)
    if not assets.model_dir.is_dir():
        with new_folder(assets.model_dir, first_wins=True) as draft:
            try:
                _write_tokenizer(draft, assets.train_file)
                _write_model(draft)
            except StoppedBySignal:
                raise
            except Exception as error:  # The libraries in Rust raise bare errors where a disk is full.
                raise error if isinstance(error, OSError) else OSError(str(error)) from None
    return assets


def _write_tokenizer(folder: Path, pairs_file: Path) -> None:
    """A byte-level BPE of VOCAB_SIZE ids, trained on the bundled pairs, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(pairs_file), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",  # noqa: S106
        bos_token="<|begin|>",  # noqa: S106
        eos_token="<|end|>",  # noqa: S106
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _texts(pairs_file: Path) -> list[str]:
    lines = pairs_file.read_text(encoding="utf-8").splitlines()
    return [message["content"] for line in lines for part in json.loads(line).values() for message in part]


def _write_model(folder: Path) -> None:
    """A million fp32 parameters from a fixed seed; eight heads divide over 1, 2 or 4 ranks."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        pad_token_id=SPECIAL_TOKENS.index("<|pad|>"),
        bos_token_id=SPECIAL_TOKENS.index("<|begin|>"),
        eos_token_id=SPECIAL_TOKENS.index("<|end|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    # Not model.save_pretrained: with a process group it writes on rank 0 only, and any rank may be the first.
    model.config.architectures, model.config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
