"""The FP8 check: its rounding, its counts, and the line that names the FP8 it used."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from ranks import REPOSITORY

from simpo_megatron.training import fp8_noise

TOOL = REPOSITORY / "tools" / "fp8_check.py"
LARGEST = 448.0


@pytest.fixture(scope="module")
def tool():
    return vars(fp8_noise)


def e4m3_numbers() -> np.ndarray:
    """All finite numbers of 1 sign, 4 exponent (bias 7) and 3 mantissa bits, by definition, without torch."""
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    subnormal = [m / 8 * 2.0**-6 for m in range(8)]
    positive = np.array(subnormal + normal)
    return np.unique(np.concatenate([-positive, positive]))


def nearest(values: np.ndarray) -> np.ndarray:
    """Distance of each value to the nearest e4m3 number."""
    return np.abs(values[..., None] - e4m3_numbers()).min(-1)


def test_one_scale_takes_the_largest_value_to_the_largest_number(tool):
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    scale = LARGEST / float(values.abs().max())
    found = tool["round_to_e4m3"](values, None)
    scaled, rounded = values.double().numpy() * scale, found.double().numpy() * scale
    assert nearest(rounded).max() < 1e-4
    np.testing.assert_allclose(np.abs(scaled - rounded), nearest(scaled), atol=1e-4)
    assert np.abs(rounded).max() == pytest.approx(LARGEST)


@pytest.mark.parametrize("block", [(128, 128), (1, 128)])
def test_each_block_has_the_largest_power_of_two_that_fits(tool, block):
    random = torch.Generator().manual_seed(1)
    values = torch.randn(130, 200, generator=random) * torch.logspace(-6, 6, 200)
    found = tool["round_to_e4m3"](values, block)
    assert found.shape == values.shape
    for row in range(0, 130, block[0]):
        for column in range(0, 200, block[1]):
            part = (slice(row, row + block[0]), slice(column, column + block[1]))
            original, rounded = values[part].double().numpy(), found[part].double().numpy()
            scale = 2.0 ** np.floor(np.log2(LARGEST / np.abs(original).max()))
            np.testing.assert_allclose(np.abs(original - rounded) * scale, nearest(original * scale), atol=1e-4)


def test_nothing_becomes_something_else_than_nothing(tool):
    for block in (None, (1, 128)):
        assert torch.equal(tool["round_to_e4m3"](torch.zeros(3, 4), block), torch.zeros(3, 4))


def test_noise_and_crossings_are_counted_in_units_of_the_target(tool):
    first = np.array([[-1.0, -1.2], [-2.0, -1.9], [-1.0, -1.45], [-3.0, -2.0]])
    second = first + np.array([[0.1, 0.0], [0.15, -0.15], [0.0, -0.1], [0.0, 0.0]])
    found = tool["FormatComparison"].of(first, second)
    np.testing.assert_allclose(found.margins, [0.2, -0.1, 0.45, -1.0])
    np.testing.assert_allclose(found.margin_noise, [0.1, 0.3, 0.1, 0.0], atol=1e-12)
    lines = "\n".join(tool["report"](found, 0.5))
    assert "margins   noise: mean +0.1250, rms 0.1658, largest 0.3000" in lines
    assert "gamma/beta is 0.5, of which the noise eats 33.2% (rms), 60.0% at most" in lines
    assert "1 of 4 pairs change the response they prefer: their margins were -0.1000" in lines
    assert "1 of 4 pairs change sides of the target margin: their margins were +0.4500" in lines


@pytest.mark.processes
def test_the_command_says_that_fp8_was_emulated(tmp_path):
    command = [sys.executable, "-W", "ignore", str(TOOL), "--pairs", "6", "--recipe", "blockwise"]
    command += ["--data-cache", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("fp8 check 6 pairs in blockwise FP8 (EMULATED in software, e4m3 in 16 linear layers")
    assert [line.split()[0] for line in lines] == ["fp8", "log-probs", "margins", "target", "signs", "crossing"]
    assert "rms 0.0000" not in done.stdout
