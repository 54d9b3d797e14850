"""Write the demonstration pairs: `python tools/write_demo_pairs.py` makes the package's *pairs.jsonl files.

Every topic is asked about several times. Chosen answers are direct, correct and courteous; rejected ones are
rude, evasive, rambling or wrong. Rejected answers are shorter than the chosen one as often as longer, so that
length tells nothing. Some wrong answers are as courteous as right ones, so a tiny model should end well above
chance and below certainty. Validation pairs ask about topics that the training pairs never mention.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SEED = 2405
NUM_VALIDATION_TOPICS = 16

FRAMES = (
    "{}",
    "Hello! {}",
    "I have a question. {}",
    "Can you help me? {}",
    "My neighbour asked me this today. {}",
    "{} I would like to know.",
)
OPENERS = (
    "Gladly.",
    "Of course.",
    "Good question!",
    "Happy to help.",
    "With pleasure.",
    "Thank you for asking.",
)
CLOSERS = (
    "I hope that helps.",
    "Just ask if anything is unclear.",
    "Let me know how it goes.",
    "Please tell me if you would like to know more.",
    "Have a lovely day!",
)
FLAWS = {
    "rude": (
        "Seriously?",
        "What a silly thing to ask.",
        "You again.",
        "I have better things to do than talk about {subject}.",
        "{answer}",
        "Even you could have known that.",
        "Now leave me alone.",
        "Do not bother me with this.",
        "Learn to think for yourself.",
    ),
    "evasive": (
        "Well, with {subject} it is hard to say.",
        "It depends on a lot of things.",
        "Some say one thing, some say another.",
        "I would rather not commit myself.",
        "Perhaps somebody else knows.",
        "You could look it up somewhere, or maybe not.",
        "There are many opinions about {subject}.",
        "Who can really tell?",
    ),
    "rambling": (
        "Ah, {subject}, that reminds me of my uncle.",
        "He had a boat, or perhaps it was a cart.",
        "It was blue in those days, before the long rain.",
        "Anyway, we ate soup that evening and nobody spoke.",
        "Where was I?",
        "My aunt never cared for {subject} either.",
        "And then there was the matter of the lost umbrella.",
        "But that is another story, and a long one.",
    ),
}
BOASTS = (
    "Everybody knows this.",
    "There is no doubt about it.",
    "I am never mistaken about {subject}.",
    "Whoever says otherwise is lying, and you need not check it.",
    "That is a fact, and books that say something else are out of date.",
)


class Topic(NamedTuple):
    """One line of topics.jsonl; every field is a sentence, `subject` a noun phrase."""

    question: str
    subject: str
    answer: str
    detail: str
    wrong: str


def pairs_of(topic: Topic, rng: random.Random) -> Iterator[dict]:
    """A preference pair for each frame, in message form; the flaws of the rejected answers alternate."""
    flaws = rng.sample((*FLAWS, "wrong"), len(FLAWS) + 1)
    for number, frame in enumerate(rng.sample(FRAMES, len(FRAMES))):
        chosen = _polite_answer(topic, rng)
        flaw = flaws[number % len(flaws)]
        if flaw == "wrong":
            boast = rng.choice(BOASTS).format(subject=topic.subject)
            rejected = _polite_answer(topic._replace(answer=topic.wrong, detail=boast), rng)
        else:
            rejected = _flawed_answer(topic, FLAWS[flaw], len(chosen.split()) * rng.choice((0.8, 1.2)), rng)
        yield {
            "prompt": [{"role": "user", "content": frame.format(topic.question)}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }


def _polite_answer(topic: Topic, rng: random.Random) -> str:
    sentences = [topic.answer]
    if rng.random() < 0.6:
        sentences.append(topic.detail)
    if rng.random() < 0.7:
        sentences.insert(0, rng.choice(OPENERS))
    if len(sentences) == 1 or rng.random() < 0.5:
        sentences.append(rng.choice(CLOSERS))
    return " ".join(sentences)


def _flawed_answer(topic: Topic, templates: tuple[str, ...], num_words_wanted: float, rng: random.Random) -> str:
    """An answer with one flaw, of at least two sentences."""
    sentences: list[str] = []
    num_words = 0
    for template in rng.sample(templates, len(templates)):
        sentence = template.format(**topic._asdict())
        length = len(sentence.split())
        if len(sentences) >= 2 and num_words + length / 2 > num_words_wanted:
            break
        sentences.append(sentence)
        num_words += length
    return " ".join(sentences)


def write_pairs(folder: Path) -> None:
    """Write both files into `folder`; the same bytes every time."""
    rng = random.Random(SEED)  # noqa: S311 - nothing here is secret
    lines = Path(__file__).with_name("topics.jsonl").read_text(encoding="utf-8").splitlines()
    topics = [Topic(**json.loads(line)) for line in rng.sample(lines, len(lines))]
    for name, part in (
        ("validation_pairs.jsonl", topics[:NUM_VALIDATION_TOPICS]),
        ("pairs.jsonl", topics[NUM_VALIDATION_TOPICS:]),
    ):
        pairs = [pair for topic in part for pair in pairs_of(topic, rng)]
        rng.shuffle(pairs)
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_pairs(Path(__file__).parents[1] / "simpo_megatron" / "demo")
