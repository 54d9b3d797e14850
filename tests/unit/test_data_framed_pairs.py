"""Pairs joined by frames are those that the proof of each rendering gives; texts that might differ are left to it."""

import random

import pytest
from chat_templates import SHAPES
from conversations import rows
from data_tokenizers import gemma_like, llama_like, qwen_like
from test_data_frames import JOINING

from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records import BadRecord, to_record
from simpo_megatron.data.rendering import PairRenderer, RenderedPair
from simpo_megatron.data.rendering.framed_pairs import FramedPairs

# Pieces of what templates write, and texts that could be taken for them.
PIECES = (
    *(
        "<|",
        "|>",
        "<",
        ">",
        "im_end|>",
        "<|im_start",
        "<|im_end|>",
        "</s",
        "s>",
        "eot_id|>",
        "assistant",
        "user\n",
        "d",
    ),
    *("<think>", "</think>", "think>", "<think", " ", "\n", "\u2003", "end", "a", "\u00e9", "Hello there."),
)
HEADER_FIRST = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}"
ODD = {
    "no end token": HEADER_FIRST + "assistant: {% endif %}",
    "half a token behind": JOINING["plain"].replace("m.content", "m.content + 'im_end|>'"),
    "half a token before": JOINING["plain"].replace("m.content", "'<|' + m.content"),
    "a text behind": JOINING["plain"].replace("<|im_end|>", "<|im_end|> and so on"),
    "a blank in front": JOINING["plain"].replace("<|im_end|>", "\n<|im_end|>"),
    "a reasoning": JOINING["plain"].replace("m.content", "'<think></think>' + m.content"),
    "only when asked": "{% for m in messages %}{% if add_generation_prompt or not loop.last or m.role != 'user' %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}
# The others write what is no special token behind a response, several of them, or a reasoning, or might join one.
FRAMED = {*JOINING, "no end token"} - {"ends twice", "llama3", "llama2"}
TOKENIZERS = {"llama": llama_like, "gemma": gemma_like}


def odd_rows(count: int, seed: int):
    rng = random.Random(seed)

    def text() -> str:
        return "".join(rng.choice(PIECES) for _ in range(rng.choice((1, 1, 2, 3, 6))))

    for _ in range(count):
        turns = [{"role": "user", "content": text()}]
        if rng.random() < 0.3:
            turns = [*turns, {"role": "assistant", "content": text()}, {"role": "user", "content": text()}]
        if rng.random() < 0.2:
            turns.insert(0, {"role": "system", "content": text()})
        yield {"prompt": turns, "chosen": text(), "rejected": text()}


def rendered(name: str, monkeypatch, *, by_frames: bool) -> tuple[list[RenderedPair | BadRecord], int]:
    """The pairs of all records as text, and how many of them frames have joined."""
    joined = 0
    join = FramedPairs.join

    def counted(*arguments):
        nonlocal joined
        found = join(*arguments) if by_frames else None
        joined += found is not None
        return found

    monkeypatch.setattr(FramedPairs, "join", counted)
    options = PairOptions(chat_template=(JOINING | ODD)[name], responses="assistant")
    renderer, records = PairRenderer(TOKENIZERS.get(name, qwen_like)(), options), []
    for row in (*odd_rows(200, seed=3), *rows(30, seed=5)):
        try:
            records.append(to_record(row, options))
        except BadRecord:
            continue
    found = list(renderer.render(records))
    monkeypatch.undo()
    return found, joined


@pytest.mark.parametrize("name", [*JOINING, *ODD])
def test_a_framed_pair_is_what_its_renderings_prove(name, monkeypatch):
    expected, _ = rendered(name, monkeypatch, by_frames=False)
    found, joined = rendered(name, monkeypatch, by_frames=True)
    assert [getattr(one, "args", one) for one in found] == [getattr(one, "args", one) for one in expected]
    assert (joined > 10) == (name in FRAMED), f"{joined} of {len(found)}"


def test_a_template_that_reads_contents_joins_no_pair(monkeypatch):
    for name in sorted(set(SHAPES) - set(JOINING)):
        monkeypatch.setitem(ODD, name, SHAPES[name])
        assert rendered(name, monkeypatch, by_frames=True)[1] == 0
