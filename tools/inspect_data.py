"""Tells what a training run would make of preference files: what is used, dropped, cut, doubled and saved.

python tools/inspect_data.py --model DIR --data pairs.jsonl --show 3
python tools/inspect_data.py --model DIR --data a.jsonl b.parquet --valid-data c.jsonl --html report.html
"""

import argparse
import sys
import tempfile
from dataclasses import replace

from rich.console import Console

from simpo_megatron.config.options import Option, option_table
from simpo_megatron.data import PairOptions, build_preference_dataset, load_tokenizer, parse_named_sources
from simpo_megatron.data.doctor import Finding, diagnose, print_diagnosis, show_pairs, write_html
from simpo_megatron.errors import SimPOError


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line: every field of PairOptions is a flag, but those about bad records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the tokenizer and its chat template")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="preference files, or weights and files in turn"
    )
    parser.add_argument(
        "--valid-data", nargs="+", default=[], metavar="FILE", help="validation files, searched for training prompts"
    )
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N pairs, response tokens marked"
    )
    parser.add_argument("--html", metavar="FILE", help="also write the diagnosis with plots to FILE")
    parser.add_argument(
        "--padded-batch", type=int, default=4, metavar="PAIRS", help="padded batch to compare with (default: 4)"
    )
    parser.add_argument(
        "--data-cache", metavar="DIR", help="keep the tokenised pairs there, for the training run"
    )
    for option in _pair_options():
        name, text = "--" + option.name.replace("_", "-"), option.help.replace("%", "%%")
        if option.kind is bool:
            parser.add_argument(name, action="store_true", help=text)
            continue
        default = "" if option.default == "" else f" (default: {option.default})"
        parser.add_argument(
            name,
            type=option.kind,
            choices=option.choices or None,
            default=option.default,
            metavar=None if option.choices else {int: "N", str: "TEXT"}[option.kind],
            help=text + default,
        )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when the files could be read, whatever was found in them."""
    arguments = parse_arguments(argv)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        tokenizer = load_tokenizer(arguments.model)
        chosen = {option.name: getattr(arguments, option.name) for option in _pair_options()}
        options = PairOptions(**chosen, bad_record="skip", max_bad_fraction=1.0)
        with tempfile.TemporaryDirectory() as scratch:
            cache = arguments.data_cache or scratch
            dataset = build_preference_dataset(arguments.data, tokenizer, options, cache)
            valid = None
            if arguments.valid_data:
                files = [file for named in parse_named_sources(arguments.valid_data).values() for file in named]
                valid = build_preference_dataset(files, tokenizer, options, cache)
            diagnosis = diagnose(dataset, tokenizer, valid, arguments.padded_batch)
            diagnosis = replace(diagnosis, sections={"Read": _reading(arguments)} | diagnosis.sections)
            shown = show_pairs(dataset, tokenizer, arguments.show) if arguments.show else []
    except SimPOError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print_diagnosis(diagnosis, shown, console)
    if arguments.html:
        write_html(diagnosis, shown, arguments.html)
        console.print(f"\nwrote {arguments.html}")
    return 0


def _reading(arguments: argparse.Namespace) -> list[Finding]:
    """What the diagnosis holds for: files, tokenizer, lengths, and every other option that is not its default."""
    findings = [Finding("files", " ".join(arguments.data)), Finding("tokenizer", arguments.model)]
    for option in _pair_options():
        value = getattr(arguments, option.name)
        if value != option.default or option.name in ("max_length", "max_prompt_length"):
            findings.append(Finding(option.name, str(value)))
    return findings


def _pair_options() -> list[Option]:
    pairs = [option for option in option_table().values() if option.section == "pairs"]
    return [option for option in pairs if option.name not in ("bad_record", "max_bad_fraction")]


if __name__ == "__main__":
    sys.exit(main())
