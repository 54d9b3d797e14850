"""The evaluation of a released model under the settings of its published scores, to check the set-up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from simpo_megatron.errors import ConfigError, GateClosed
from simpo_megatron.evaluation.published import PUBLISHED, TOLERANCE, PublishedRun
from simpo_megatron.generation.answering import Decoding
from simpo_megatron.generation.engines import Engine


def published_run(benchmark: str, name: str) -> PublishedRun:
    """The published run of the model `name`.

    Raises: ConfigError for a model whose settings are not published.
    """
    of_benchmark = PUBLISHED[benchmark]
    if name not in of_benchmark:
        raise ConfigError(f"as: found {name!r}, expected one whose settings are published: {', '.join(of_benchmark)}")
    return of_benchmark[name]


def published_decoding(run: PublishedRun, seed: int) -> Decoding:
    """The settings of the published answers."""
    return Decoding(max_new_tokens=run.max_new_tokens, temperature=run.temperature, seed=seed)


def check_engine(engine: Engine, run: PublishedRun, question: str) -> Iterator[str]:
    """Yields a line for each difference from the published settings.

    Raises: ConfigError where an answer would end at other stop ids.
    """
    stops = engine.identity().get("stop_ids")
    if stops is None:
        yield "WARNING   template and stop ids are the server's, which cannot be checked from here"
        return
    if missing := sorted(set(run.stop_ids) - set(stops)):
        raise ConfigError(
            f"generation_config.json: found the stop ids {stops}, expected {', '.join(map(str, missing))} too, where "
            "the published answers end; add them to its eos_token_id"
        )
    found = engine.rendered([{"role": "user", "content": question}]) or ""
    expected = run.prompt.replace("{instruction}", question.strip())
    if _without_bos(found) != _without_bos(expected):
        yield f"WARNING   the model is shown {found[:80]!r}, the published one was shown {expected[:80]!r}"


def compare_with_published(name: str, run: PublishedRun, score: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each published score, and a verdict.

    Args:
        score: what `score-JUDGE.json` holds.

    Raises:
        ConfigError: the score cannot be compared with a published one at all.
        GateClosed: one of the scores is further from the published one than TOLERANCE.
    """
    if reasons := score["not_comparable"]:
        raise ConfigError(f"reproduce: found no score to compare ({'; '.join(reasons)}), expected the benchmark's own")
    metrics = score["metrics"]
    if missing := [metric for metric in run.scores if metric not in metrics]:
        raise ConfigError(f"reproduce: found no {missing[0]} ({'; '.join(score['notes'])}), expected one to compare")
    apart = {metric: metrics[metric]["value"] - published for metric, published in run.scores.items()}
    for metric, published in run.scores.items():
        yield f"published {published:.1f}, here {metrics[metric]['value']:.1f}, {apart[metric]:+.1f} points: {metric}"
    furthest = max(apart.values(), key=abs)
    if abs(furthest) > TOLERANCE:
        raise GateClosed(
            f"reproduce: found {name} {furthest:+.1f} points from its published score, expected at most {TOLERANCE:g}; "
            "the set-up differs: look at template, stop ids, dtype, batch size and judge before any other model"
        )
    yield f"verdict   within {TOLERANCE:g} points of the published score: scores of other models can be trusted"


def _without_bos(text: str) -> str:
    for bos in ("<|begin_of_text|>", "<bos>", "<s>"):
        text = text.removeprefix(bos)
    return text.lstrip()
