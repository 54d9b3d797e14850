"""Inspection of preference data: the pairs a run would read, drop and truncate, the tokens it saves; as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from simpo_megatron.data.dataset import PreferenceDataset
from simpo_megatron.data.inspection.pair_counts import cut_pairs, lost_tokens, unread_column
from simpo_megatron.data.inspection.shown_pairs import ShownPair
from simpo_megatron.data.inspection.token_scan import edges, pair_hashes
from simpo_megatron.data.records import MORE_COMPLETIONS, UNUSABLE_REASONS
from simpo_megatron.data.rendering import FINDINGS, HARMLESS
from simpo_megatron.data.tokenization import PARTS
from simpo_megatron.errors import visible

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

_STYLES = {"prompt": "dim", "context": "dim", "chosen": "green", "rejected": "red", "cut": "yellow"}
# If length alone predicts the preference this often, the model may learn length instead of quality.
LENGTH_BIAS_LIMIT = 0.6
# A correlation of scores with length above this suggests that scores reward length.
LENGTH_CORRELATION_LIMIT = 0.4


@dataclass(frozen=True)
class InspectedRow:
    """One line of an inspection; `warning` when it deserves a look before training."""

    name: str
    value: str
    warning: bool = False


@dataclass(frozen=True)
class DatasetInspection:
    """The findings in a dataset, for the terminal and for a page."""

    sections: dict[str, list[InspectedRow]]
    """Lines under their headings."""
    lengths: np.ndarray
    """int32 [num_pairs, 3]: tokens of prompt, chosen and rejected, those of context left out, for histograms."""


def inspect_dataset(
    dataset: PreferenceDataset,
    tokenizer: PreTrainedTokenizerBase,
    validation: PreferenceDataset | None = None,
    micro_batch_size: int = 4,
) -> DatasetInspection:
    """Returns the inspection of `dataset`, with a comparison to padded batches of `micro_batch_size` pairs."""
    spoken = np.column_stack((dataset.lengths[:, 0], dataset.counted))
    sections = {
        "Records": _records(dataset),
        "Special tokens": _special_tokens(dataset, tokenizer),
        "Truncation": _truncation(dataset),
        "Lengths in tokens": _length_bias(spoken),
        "Work saved": _work_saved(dataset, micro_batch_size),
        "Duplicates": _duplicates(dataset),
    }
    if not np.isnan(dataset.score_gaps).all():
        sections["Scores"] = _scores(dataset)
    if validation is not None:
        sections["Validation"] = _leaks(dataset, validation)
    return DatasetInspection(sections, spoken)


def num_leaked(dataset: PreferenceDataset, validation: PreferenceDataset) -> int:
    """Returns how many pairs of `validation` have a prompt that `dataset` has too."""
    return int(np.isin(validation.prompt_keys, dataset.prompt_keys).sum())


def histogram(lengths: np.ndarray, num_bins: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Returns (bin edges, counts [2, num_bins] of chosen and rejected), the bins of equal width."""
    edges = np.linspace(0, lengths[:, 1:].max(), num_bins + 1)
    return edges, np.stack([np.histogram(lengths[:, part], edges)[0] for part in (1, 2)])


def _records(dataset: PreferenceDataset) -> list[InspectedRow]:
    report = dataset.report
    num_dropped = f"{sum(report.dropped.values()):,}"
    if not report.dropped.keys() <= UNUSABLE_REASONS:
        num_dropped += ", where bad_record is skip; a run stops at the first malformed one else"
    rows = [
        InspectedRow("records", f"{report.num_lines:,}"),
        InspectedRow("pairs used", f"{report.num_used:,}"),
        InspectedRow("records dropped", num_dropped),
    ]
    for reason, count in report.dropped.most_common():
        first = report.first[reason].replace(f": {reason}: ", ": ")
        rows.append(InspectedRow(f"  {reason}", f"{count:,}, first at {first}", reason != "blank_line"))
    rows += [InspectedRow("read as", f"{form}: {count:,}") for form, count in report.forms.most_common()]
    if report.extra_keys:
        rows.append(InspectedRow("columns not read", ", ".join(sorted(report.extra_keys)), bool(report.extra_texts)))
    rows += [InspectedRow("  with text", unread_column(report, key), True) for key in report.extra_texts]
    if count := report.notes[MORE_COMPLETIONS]:
        place = report.place(MORE_COMPLETIONS)
        text = f"{count:,}, best and worst taken, first at {place}"
        rows.append(InspectedRow("more than two completions", text, True))
    rows += [
        InspectedRow(
            f"  {name}", f"{count:,} pairs, first at {report.place(name)}: {FINDINGS[name]}", name not in HARMLESS
        )
        for name, count in report.notes.most_common()
        if name in FINDINGS
    ]
    if len(dataset) != report.num_used:
        rows.append(InspectedRow("pairs in this choice", f"{len(dataset):,}"))
    return rows


def _special_tokens(dataset: PreferenceDataset, tokenizer: PreTrainedTokenizerBase) -> list[InspectedRow]:
    bos, (first, last) = tokenizer.bos_token_id, edges(dataset)
    has_bos = first == (-2 if bos is None else bos)
    is_end = np.isin(last, [*set(tokenizer.all_special_ids)])
    is_open, is_cut = ~is_end[..., 1], dataset.lost[:, 1:] > 0
    counts = {
        "two BOS at the start": has_bos.all(axis=1).sum(),
        "no BOS at the start": (~has_bos[:, 0]).sum() if bos is not None else 0,
        "responses with two end tokens": is_end.all(axis=2).sum(),
        "responses without an end token, cut ones": (is_open & is_cut).sum(),
        "responses without an end token, whole ones": (is_open & ~is_cut).sum(),
    }
    return [InspectedRow(name, f"{count:,}", count > 0) for name, count in counts.items()]


def _truncation(dataset: PreferenceDataset) -> list[InspectedRow]:
    rows = []
    for part, name in enumerate(PARTS):
        lost = dataset.lost[:, part]
        text = f"{cut_pairs(dataset, part) or '0 cut'}, {lost_tokens(lost, dataset.lengths[:, part])}"
        rows.append(InspectedRow(name, text, bool((lost > 0).mean() > 0.05)))
    return rows


def _length_bias(lengths: np.ndarray) -> list[InspectedRow]:
    rows = []
    for part, name in enumerate(PARTS):
        column = lengths[:, part]
        median, most, longest = np.quantile(column, (0.5, 0.95, 1))
        text = f"mean {column.mean():.1f}, median {median:,.0f}, 95% up to {most:,.0f}, longest {longest:,.0f}"
        rows.append(InspectedRow(name, text))
    longer, equal = lengths[:, 1] > lengths[:, 2], lengths[:, 1] == lengths[:, 2]
    judge = float(longer.mean() + equal.mean() / 2)
    ratio = lengths[:, 1].sum(dtype=np.int64) / lengths[:, 2].sum(dtype=np.int64)
    is_biased = max(judge, 1 - judge) > LENGTH_BIAS_LIMIT
    rows.append(InspectedRow("chosen tokens per rejected token", f"{ratio:.3f}"))
    rows.append(InspectedRow("chosen is the longer response", f"{judge:.1%}", is_biased))
    return rows


def _scores(dataset: PreferenceDataset) -> list[InspectedRow]:
    """Rows on the gap of the responses' scores, and how far length goes along with it."""
    is_scored = ~np.isnan(dataset.score_gaps)
    gaps = dataset.score_gaps[is_scored].astype(np.float64)
    longer = np.subtract(*dataset.counted[is_scored].T.astype(np.float64))
    low, median, high = np.quantile(gaps, (0.1, 0.5, 0.9))
    lower = np.flatnonzero(is_scored)[gaps < 0]
    text = f"{len(lower):,}" + (
        f", first at {dataset.places(lower.tolist(), 1).split(' and ')[0]}" if len(lower) else ""
    )
    varies = len(gaps) > 1 and gaps.std() > 0 and longer.std() > 0
    correlation = float(np.corrcoef(gaps, longer)[0, 1]) if varies else 0.0
    return [
        InspectedRow("pairs with scores", f"{len(gaps):,} of {len(dataset):,}"),
        InspectedRow("score gap", f"median {median:.3g}, 80% from {low:.3g} to {high:.3g}"),
        InspectedRow("chosen has the lower score", text, len(lower) > 0),
        InspectedRow(
            "score gap against extra length",
            f"correlation {correlation:+.2f}" if varies else "none: one of them does not vary",
            abs(correlation) > LENGTH_CORRELATION_LIMIT,
        ),
    ]


def _work_saved(dataset: PreferenceDataset, micro_batch_size: int) -> list[InspectedRow]:
    total = dataset.lengths.astype(np.int64)
    longest = total[:, 0] + total[:, 1:].max(axis=1)
    order = np.random.default_rng(0).permutation(len(longest))
    starts = range(0, len(longest), micro_batch_size)
    groups = [longest[order[start : start + micro_batch_size]] for start in starts]
    padded = sum(2 * len(group) * int(group.max()) for group in groups)
    packed, shared = int((total @ [2, 1, 1]).sum()), int(total.sum())
    responses = int(dataset.counted.sum(dtype=np.int64))
    context = int(total[:, 1:].sum()) - responses
    in_context = [InspectedRow("tokens of context in responses", f"{context:,}")] if context else []
    return [
        InspectedRow(f"tokens in padded batches of {micro_batch_size} pairs", f"{padded:,}"),
        InspectedRow("tokens in packs", f"{packed:,} ({padded / packed:.2f} times fewer)"),
        InspectedRow("tokens in packs that share prompts", f"{shared:,} ({padded / shared:.2f} times fewer)"),
        InspectedRow("response tokens, which the loss sees", f"{responses:,} ({responses / shared:.0%} of these)"),
        *in_context,
    ]


def _duplicates(dataset: PreferenceDataset) -> list[InspectedRow]:
    repeated = len(dataset) - len(np.unique(pair_hashes(dataset)))
    prompts, counts = np.unique(dataset.prompt_keys, return_counts=True)
    return [
        InspectedRow("pairs that repeat another one", f"{repeated:,}", repeated > 0),
        InspectedRow("different prompts", f"{len(prompts):,}, the most frequent {counts.max():,} times"),
    ]


def _leaks(dataset: PreferenceDataset, validation: PreferenceDataset) -> list[InspectedRow]:
    leaked = num_leaked(dataset, validation)
    return [
        InspectedRow("validation pairs", f"{len(validation):,}"),
        InspectedRow("of them with a prompt of the training pairs", f"{leaked:,}", leaked > 0),
    ]


def print_inspection(inspection: DatasetInspection, shown: Sequence[ShownPair], console: Console) -> None:
    """Prints an inspection and the shown pairs to a rich console, lines that deserve a look in yellow."""
    from rich.table import Column, Table
    from rich.text import Text

    table = Table.grid(Column(overflow="fold"), Column(overflow="fold"), padding=(0, 2))
    for title, rows in inspection.sections.items():
        table.add_row(Text(title, style="bold"))
        for row in rows:
            texts = ("  " + visible(row.name), visible(row.value))
            table.add_row(*(Text(text, "yellow" if row.warning else "") for text in texts))
    console.print(table)
    edges, counts = histogram(inspection.lengths)
    console.print(Text("Response lengths in tokens: chosen, rejected", style="bold"))
    for number, (chosen, rejected) in enumerate(counts.T):
        bars = [("#" * round(24 * count / counts.max())).ljust(24) for count in (chosen, rejected)]
        line = Text(f"  to {edges[number + 1]:6.0f}  ")
        console.print(
            line.append(bars[0], "green").append(f" {chosen:<7}").append(bars[1], "red").append(f" {rejected}")
        )
    for pair in shown:
        console.print(Text(f"\n{visible(pair.where)}", style="bold"))
        for name, text in pair.pieces:
            shown_text = visible(text, keep="\n\t")
            console.print(Text(f"[{name}] ", "bold").append(shown_text, _STYLES[name]), soft_wrap=True)
