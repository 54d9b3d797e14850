"""The page of an inspected dataset: its lines, plots of its lengths, and pairs as the model sees them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simpo_megatron.data.inspection import DatasetInspection, ShownPair, histogram
from simpo_megatron.data.tokenization import PARTS
from simpo_megatron.reporting.rendering import render


def write_data_page(inspection: DatasetInspection, shown: Sequence[ShownPair], path: str | Path) -> None:
    """Writes `inspection` and the `shown` pairs as one self-contained HTML file."""
    page = render(
        "data_page.html",
        title="Preference data",
        sections=list(inspection.sections.items()),
        picture=base64.b64encode(_draw_lengths(inspection.lengths)).decode(),
        pairs=[(pair.where, pair.pieces) for pair in shown],
    )
    # A file's name may hold bytes that are no text, which the page could not encode.
    Path(path).write_text(page, encoding="utf-8", errors="backslashreplace")


def _draw_lengths(lengths: np.ndarray) -> bytes:
    """A PNG of 1200 x 420 pixels: the lengths of responses, and the difference between chosen and rejected.

    Args:
        lengths: int32 [num_pairs, 3], tokens of prompt, chosen and rejected.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges, counts = histogram(lengths, num_bins=40)
    for name, row, color in zip(PARTS[1:], counts, ("tab:green", "tab:red"), strict=True):
        left.stairs(row, edges, label=name, color=color, fill=True, alpha=0.5)
    left.set(xlabel="tokens of a response", ylabel="responses")
    left.legend()
    right.hist(lengths[:, 1] - lengths[:, 2], bins=60, color="tab:blue")
    right.axvline(0, color="black", linewidth=1)
    right.set(xlabel="tokens of chosen - tokens of rejected", ylabel="pairs")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
