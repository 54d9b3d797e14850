"""Published scores of SimPO's released models, and the settings of their answers.

Source: princeton-nlp/SimPO 1b3e8f3, `eval/` and README; arXiv 2405.14734, table 4; AlpacaEval's leaderboard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
_LLAMA3_STOPS = (128001, 128009)
_ZEPHYR = "<|system|>\n</s>\n<|user|>\n{instruction}</s>\n<|assistant|>\n"
_GEMMA = "<bos><start_of_turn>user\n{instruction}<end_of_turn>\n<start_of_turn>model\n"
_INST = "[INST] {instruction} [/INST]"

JUDGE = "gpt-4-1106-preview"
"""The judge of all of them."""
TOLERANCE = 3.0
"""Points by which a score may differ from the published one in a correct set-up.

The authors' own two evaluations of one checkpoint differ by 1 (issue 21 of their repository); one evaluation's standard
error is 0.9 on AlpacaEval and about 1.6 on Arena-Hard. Twice the error of a difference of two is some 3.
"""


@dataclass(frozen=True)
class PublishedRun:
    """The settings under which a released model answered a benchmark, and its published scores in percent."""

    prompt: str
    """The rendered prompt without BOS."""
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    scores: Mapping[str, float]
    temperature: float = 0.0
    why: str = ""
    """The reason why the temperature differs from the published YAML."""


# alpaca-eval 0.6.2 turned `do_sample: true` into a beam search of one beam, greedy at any temperature.
_BEAM = "its YAML's do_sample meant a beam search of one beam, which is greedy at any temperature"


def _alpaca(length_controlled: float, win_rate: float) -> Mapping[str, float]:
    return {"length-controlled win rate": length_controlled, "win rate": win_rate}


PUBLISHED: Mapping[str, Mapping[str, PublishedRun]] = {
    "alpaca-eval": {
        "Llama-3-Base-8B-SFT-SimPO": PublishedRun(_LLAMA3, _LLAMA3_STOPS, 4096, _alpaca(22.0, 20.3), why=_BEAM),
        "Llama-3-Instruct-8B-SimPO": PublishedRun(_LLAMA3, _LLAMA3_STOPS, 4096, _alpaca(44.7, 40.5), why=_BEAM),
        "Mistral-7B-Base-SFT-SimPO": PublishedRun(_ZEPHYR, (2,), 2048, _alpaca(21.4, 20.8), why=_BEAM),
        "Mistral-7B-Instruct-SimPO": PublishedRun(_INST, (2,), 2048, _alpaca(32.1, 34.8), 0.5),
        "gemma-2-9b-it-SimPO": PublishedRun(_GEMMA, (1, 107), 4096, _alpaca(72.4, 65.9), why=_BEAM),
    },
    "arena-hard": {
        "Llama-3-Base-8B-SFT-SimPO": PublishedRun(_LLAMA3, _LLAMA3_STOPS, 4096, {"win rate": 23.4}),
        "Llama-3-Instruct-8B-SimPO": PublishedRun(_LLAMA3, _LLAMA3_STOPS, 4096, {"win rate": 33.8}),
        "Mistral-7B-Base-SFT-SimPO": PublishedRun(_ZEPHYR, (2,), 4096, {"win rate": 16.6}),
        "Mistral-7B-Instruct-SimPO": PublishedRun(_INST, (2,), 4096, {"win rate": 21.0}),
        "gemma-2-9b-it-SimPO": PublishedRun(_GEMMA, (1, 107), 4096, {"win rate": 59.1}),
    },
}
