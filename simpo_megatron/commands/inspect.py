"""Shows how a training run would read preference files: pairs used, dropped, cut and doubled, and tokens saved.

simpo inspect --model DIR --data pairs.jsonl --preset llama3-instruct-v0.2 --show 3
simpo inspect --model DIR --data a.jsonl b.parquet --valid-data c.jsonl --html report.html

Every option of the trainer may follow, its presets and YAML files too; those that concern pairs (--max-length,
--template-mode, --chosen-column ...) are applied. Malformed records are counted and skipped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from rich.console import Console

from simpo_megatron.commands.parsing import CommandParser
from simpo_megatron.config import DEMO, Config, load_config
from simpo_megatron.data import PreferenceDataset, build_preference_dataset, load_tokenizer, parse_named_sources
from simpo_megatron.data.inspection import InspectedRow, inspect_dataset, print_inspection, show_pairs
from simpo_megatron.data.rendering import lacks_template
from simpo_megatron.data.tokenization import torch_left_out
from simpo_megatron.errors import SimPOError, report_error, visible
from simpo_megatron.mcore.hf import model_folder
from simpo_megatron.reporting.data_page import write_data_page

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def parse_arguments(argv: Sequence[str], prog: str) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options and, untouched, those of the trainer."""
    parser = CommandParser(prog, __doc__, takes_trainer_options=True)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the tokenizer and its chat template")
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="preference files, with weights before them if wanted",
    )
    parser.add_argument(
        "--valid-data",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="validation files, searched for training prompts",
    )
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N pairs with the response tokens marked"
    )
    parser.add_argument("--html", metavar="FILE", help="also write the inspection with plots to FILE")
    parser.add_argument(
        "--padded-batch",
        type=int,
        default=4,
        metavar="PAIRS",
        help="pairs of the padded batch to compare with, default 4",
    )
    return parser.parse_known_args(argv)


def main(argv: Sequence[str], prog: str = "simpo inspect") -> int:
    """The exit code: 0 when the files could be read, whatever was found in them."""
    arguments, of_the_trainer = parse_arguments(argv, prog)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        files = ["--data", *arguments.data]
        if arguments.valid_data:
            files += ["--valid-data", *arguments.valid_data]
        config = load_config([*of_the_trainer, "--model", arguments.model, *files])
        if DEMO in (config.model.model, *config.data.data):
            config = _with_demo(config)
        assert config.model.model is not None, "--model is required"
        with torch_left_out(), tempfile.TemporaryDirectory() as scratch:
            tokenizer = load_tokenizer(model_folder(config.model.model))
            dataset, valid = _read(config, tokenizer, config.data.data_cache or scratch)
            inspection = inspect_dataset(dataset, tokenizer, valid, arguments.padded_batch)
            inspection = replace(inspection, sections={"Read": _reading(config, tokenizer)} | inspection.sections)
            shown = show_pairs(dataset, tokenizer, arguments.show) if arguments.show else []
    except SimPOError as error:
        return report_error(error)
    print_inspection(inspection, shown, console)
    if arguments.html:
        write_data_page(inspection, shown, arguments.html)
        console.print(f"\nwrote {visible(arguments.html)}", markup=False)
    return 0


def _with_demo(config: Config) -> Config:
    """`config` with files in place of the embedded default's name."""
    from simpo_megatron.training.start.inputs import locate_sources

    sources = locate_sources(config)
    return replace(
        config,
        model=replace(config.model, model=str(sources.model)),
        data=replace(config.data, data=sources.train),
    )


def _read(
    config: Config, tokenizer: PreTrainedTokenizerBase, cache: str
) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    options = replace(config.pairs, bad_record="skip", max_bad_fraction=1.0)
    dataset = build_preference_dataset(config.data.data, tokenizer, options, cache)
    validation = [file for named in parse_named_sources(config.data.valid_data).values() for file in named]
    return dataset, build_preference_dataset(validation, tokenizer, options, cache) if validation else None


def _reading(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[InspectedRow]:
    """The settings of the inspection: files, tokenizer, and every option that changes tokens."""
    findings = [InspectedRow("files", " ".join(config.data.data)), InspectedRow("tokenizer", str(config.model.model))]
    for option in fields(config.pairs):
        value = getattr(config.pairs, option.name)
        if value != option.default or option.name in ("max_length", "max_prompt_length", "template_mode"):
            findings.append(InspectedRow(option.name, str(value)))
    if lacks_template(tokenizer, config.pairs):
        joined = "none in the tokenizer: prompt and response are joined as they are"
        findings.append(InspectedRow("chat_template", joined, warning=True))
    return findings
