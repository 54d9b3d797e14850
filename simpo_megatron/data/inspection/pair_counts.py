"""Lines on a dataset for the first lines of a run: how it was read, what is used, dropped and cut."""

from __future__ import annotations

import numpy as np

from simpo_megatron.data.dataset import PreferenceDataset
from simpo_megatron.data.records import MORE_COMPLETIONS
from simpo_megatron.data.rendering import FINDINGS, HARMLESS
from simpo_megatron.data.store import BuildReport
from simpo_megatron.errors import listed

_MAX_FORMS = 3
_MAX_COLUMNS = 8


def read_as(dataset: PreferenceDataset, name: str = "") -> list[str]:
    """Returns lines on the forms in which the records were read, and on the columns that were not read."""
    report = dataset.report
    forms = "; ".join(
        form if count == report.forms.total() else f"{form} ({count:,} of {report.forms.total():,})"
        for form, count in report.forms.most_common(_MAX_FORMS)
    )
    lines = [f"read as:  {name}{forms}"] if forms else []
    if texts := report.extra_texts:
        shown = listed((unread_column(report, key) for key in texts), _MAX_COLUMNS)
        lines.append(f"WARNING   {name}columns with text that are not read: {shown}")
    if others := sorted(set(report.extra_keys) - set(texts)):
        lines.append(f"columns   {name}not read, without text: {listed(others, _MAX_COLUMNS)}")
    if count := report.notes[MORE_COMPLETIONS]:
        place = report.place(MORE_COMPLETIONS)
        lines.append(f"ranked    {name}{count:,} of more than two completions: best and worst taken (first at {place})")
    return lines


def unread_column(report: BuildReport, key: str) -> str:
    """`key (in 3, first at pairs:7)`: a column with text that is not read, and how many records have it."""
    return f"{key} (in {report.extra_texts[key]:,}, first at {report.place(key)})"


def summary(dataset: PreferenceDataset, name: str = "") -> list[str]:
    """Returns lines on the records that were used and dropped, and on the tokens that truncation removed."""
    report, lost = dataset.report, dataset.lost
    dropped = ", ".join(
        f"{count:,} {reason} (first at {report.place(reason)})" for reason, count in report.dropped.most_common()
    )
    lines = [f"records   {name}{report.num_lines:,}: {report.num_used:,} used, dropped {dropped or 'none'}"]
    lines += [
        f"noted     {name}{count:,} {note} (first at {report.place(note)}): {FINDINGS[note]}"
        for note, count in report.notes.most_common()
        if note in FINDINGS and note not in HARMLESS
    ]
    shares = dataset.shares()
    if len(shares) > 1:
        taken = listed((f"{count:,} of {of:,} pairs of {file}" for file, count, of in shares), _MAX_COLUMNS)
        lines.append(f"files     {name}{taken}")
    if lost.any():
        counts = [cut_pairs(dataset, part) for part in range(3)]
        names = ("prompts", "chosen", "rejected")
        parts = ", ".join(text.replace(" cut", f" {name}", 1) for text, name in zip(counts, names, strict=True) if text)
        lines.append(f"cut       {name}{parts}: {lost_tokens(lost, dataset.lengths)}")
    return lines


def cut_pairs(dataset: PreferenceDataset, part: int) -> str:
    """`3 cut (first at pairs:7)`: how many prompts, chosen or rejected responses are; empty for none."""
    indices = np.flatnonzero(dataset.lost[:, part] > 0)
    return f"{len(indices):,} cut (first at {dataset.places(indices[:1].tolist(), 1)})" if len(indices) else ""


def lost_tokens(lost: np.ndarray, lengths: np.ndarray) -> str:
    """`12 tokens lost (3.4%)`: those that were cut, and their share of all; `lengths` are what is left."""
    num_lost = lost.sum(dtype=np.int64)
    return f"{num_lost:,} tokens lost ({num_lost / max(num_lost + lengths.sum(dtype=np.int64), 1):.1%})"
