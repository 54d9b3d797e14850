"""Answers the prompts of a file with a model, by its own chat template and stop ids, and records the settings.

simpo generate --model DIR --prompts prompts.jsonl --out answers/mine
simpo generate --model NAME --url http://host:8000/v1 --prompts questions.jsonl --out answers/mine
simpo generate --model DIR --prompts pairs.jsonl --samples 5 --temperature 0.8 --out answers/policy

--model is a Hugging Face folder, which transformers runs in this process. With --engine vllm an environment of its own
runs it. With --url it is the name of a model behind a server that speaks OpenAI's protocol. Prompts have messages,
turns or text; preference pairs serve, too. The same command continues where it was stopped; other settings are refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.commands.printing import print_lines
from simpo_megatron.errors import ConfigError, require
from simpo_megatron.generation.answering import Decoding, answer_prompts
from simpo_megatron.generation.engines import Engine, ServerEngine, TransformersEngine
from simpo_megatron.generation.server import ChatServer

ENGINES = ("transformers", "vllm")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse_arguments(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument(
        "--prompts", required=True, type=Path, metavar="FILE", help="prompts, as JSON Lines or a JSON list"
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder, or with --url a name")
    add_engine_options(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=1024, metavar="N", help="most tokens of an answer, default 1024"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="sampling temperature, default 0 (greedy)"
    )
    parser.add_argument(
        "--temperature-of",
        nargs="+",
        default=[],
        metavar="CATEGORY=X",
        help="temperature of prompts of a category, as in MT-Bench: writing=0.7 roleplay=0.7 stem=0.1",
    )
    parser.add_argument("--samples", type=int, default=1, metavar="K", help="answers for each prompt, default 1")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of sampling, default 42")
    return parser.parse_args(argv)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the engine, beside `--model`, and where its answers go."""
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for answers and settings")
    parser.add_argument("--url", metavar="URL", help="server with OpenAI's protocol, such as http://host:8000/v1")
    parser.add_argument(
        "--at-once", type=int, default=16, metavar="N", help="requests to the server at a time, default 16"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="engine for a folder, default transformers; vllm runs under its own Python",
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="with vllm: GPUs of one replica, default 1")
    parser.add_argument("--dp", type=int, default=1, metavar="N", help="with vllm: replicas, default 1")
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        metavar="X",
        help="with vllm: share of a GPU's memory, or of the machine's without one, that it takes; default is vLLM's",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of a folder's model; auto keeps the stored one"
    )


def main(argv: Sequence[str], prog: str = "simpo generate") -> int:
    """The exit code: 0 when every prompt is answered, else that of the error, which is printed."""
    return print_lines(_generate(parse_arguments(argv, prog)))


def _generate(arguments: argparse.Namespace) -> Iterator[str]:
    decoding = Decoding(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        temperatures=dict(map(_temperature, arguments.temperature_of)),
        seed=arguments.seed,
        num_samples=arguments.samples,
    )
    with closing(engine_of(arguments)) as engine:
        yield from answer_prompts(engine, arguments.prompts, arguments.out, decoding)


def engine_of(arguments: argparse.Namespace) -> Engine:
    """The engine that `add_engine_options` asked for.

    Raises: ConfigError when the folder is no model's.
    """
    if arguments.url is not None:
        return ServerEngine(ChatServer(arguments.url, arguments.model), max(1, arguments.at_once))
    folder = Path(arguments.model)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model: found {folder}, expected a Hugging Face folder with weights; of a run it is made by "
            f"simpo convert mcore-to-hf {folder} OUT"
        )
    if arguments.engine == "vllm":
        from simpo_megatron.generation.vllm_engine import VllmEngine

        return VllmEngine(
            folder,
            arguments.out / "vllm.log",
            dtype=arguments.dtype,
            tensor_parallel_size=arguments.tp,
            data_parallel_size=arguments.dp,
            gpu_memory_utilization=arguments.gpu_memory_utilization,
        )
    require(
        arguments.tp == arguments.dp == 1, "tp, dp", f"{arguments.tp}, {arguments.dp}", "1 with the engine transformers"
    )
    share = arguments.gpu_memory_utilization
    require(share is None, "gpu_memory_utilization", share, "none with the engine transformers")
    return TransformersEngine(folder, dtype=arguments.dtype)


def _temperature(text: str) -> tuple[str, float]:
    category, _, value = text.partition("=")
    try:
        return category, float(value)
    except ValueError:
        raise ConfigError(f"temperature_of: found {text[:60]!r}, expected CATEGORY=X, as in writing=0.7") from None
