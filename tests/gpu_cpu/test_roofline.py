"""The roofline counts what each method of the loss has to do, and says that it is a model."""

from __future__ import annotations

import pytest

from tools.benchmarks import roofline

pytest.importorskip("triton", reason="Triton is not installed; make test-gpu-cpu has it")

HIDDEN, WIDTH = 64, 1024
BATCH = roofline.Microbatch.of(3, 30, 40)


def counted(method: str) -> roofline.Count:
    return roofline.Count.of(roofline.METHODS[method](BATCH, HIDDEN, WIDTH))


def test_lengths_have_the_means_asked_for_and_differ():
    batch = roofline.Microbatch.of(200, 300, 400)
    assert batch.prompts.mean() == pytest.approx(300, rel=0.01) and batch.responses.mean() == pytest.approx(
        400, rel=0.01
    )
    assert batch.prompts.std() > 50 and batch.responses.shape == (200, 2)


def test_ours_multiplies_response_rows_and_the_peers_every_position():
    rows, length = BATCH.padded_shape
    positions = {"ours": BATCH.responses.sum()} | dict.fromkeys(
        ("trl", "trl, two passes", "princeton", "liger"), rows * length
    )
    assert set(positions) == set(roofline.METHODS)
    for method, num_rows in positions.items():
        # Sums over a few pairs are products, too.
        assert counted(method).flops == pytest.approx(6 * num_rows * WIDTH * HIDDEN, rel=1e-6), method


def test_every_method_reads_and_writes_the_logits_it_has():
    rows, length = BATCH.padded_shape
    logits = 2 * rows * length * WIDTH
    # TRL: the log-softmax and its gradient in bf16. princeton and Liger: a copy in fp32 and those in fp32.
    for method, least in (("trl", 5), ("trl, two passes", 3), ("princeton", 12), ("liger", 10)):
        assert counted(method).elementwise_bytes >= least * logits, method


def test_the_table_says_what_it_is(capsys):
    assert roofline.main(["--shape", "70B tp8", "--pairs", "1", "--methods", "ours", "trl, two passes"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A MODEL, nothing of it measured")
    (line,) = [line for line in printed.splitlines() if line.startswith("| ours")]
    assert line.endswith("| 1.00 |")
