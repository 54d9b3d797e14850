"""The roofline counts what each method of the loss has to do, and says that it is a model."""

from __future__ import annotations

import pytest

from tools.benchmarks import roofline
from tools.benchmarks.roofline import Count

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


TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@pytest.mark.processes
def test_a_whole_microbatch_multiplies_each_weight_by_its_tokens_three_times():
    """Products of ours are those of packed tokens and response rows, products of the peers those of padded ones."""
    counts = {name: (gpus, count) for name, gpus, count in roofline.whole_counts(TINY, BATCH, 1)}
    assert {"ours", "trl", "princeton"} <= set(counts)
    rows, length = BATCH.padded_shape
    attention = 64 * (64 + 2 * 16) + 64 * 64
    layers = TINY["num_hidden_layers"] * (attention + 3 * 64 * 96)
    for name, (gpus, count) in counts.items():
        tokens, head_rows = (
            (BATCH.packed_tokens, BATCH.responses.sum()) if name == "ours" else (rows * length, rows * length)
        )
        # Liger's rows end before the last token.
        head_rows = rows * (length - 1) if name == "liger" else head_rows
        expected = 6 * (tokens * layers + head_rows * 512 * 64)
        # Sums over a few rows are products, too.
        assert gpus == 1 and count.flops == pytest.approx(expected, rel=1e-2), name
        assert count.attention_flops > 0 and count.launches > 50 and count.collective_bytes == 0


@pytest.mark.processes
def test_a_rank_of_several_has_its_share_and_sends_what_the_others_need(capsys):
    alone, shared = (Count.of(roofline.roofline_microbatch.ours(TINY, BATCH, ranks)) for ranks in (1, 2))
    assert shared.flops == pytest.approx(alone.flops / 2, rel=5e-2)
    assert alone.collective_bytes == 0 and shared.collective_bytes > 0


def test_the_table_of_whole_microbatches_says_what_it_is(capsys, monkeypatch):
    monkeypatch.setattr(roofline, "MODELS", {"tiny": (TINY, 1, 3)})
    monkeypatch.setattr(roofline.roofline_microbatch, "ours", lambda *_: [roofline.Operation("mm", 1, 10**12, (1,))])
    assert roofline.main(["--whole"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A MODEL, nothing of it measured")
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert lines[1].startswith("| ours | 1 |") and lines[1].endswith("| 1.00 |")
