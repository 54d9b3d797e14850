"""Generated preference rows of conversations: roles, tools, reasoning, parts, blanks and letters of all kinds.

Each turn says a number that no other turn says, so that a number tells whose text it stands in.
"""

import copy
import random
from collections.abc import Iterator

WORDS = (
    "the", "ans", "\u00e9", "e\u0301", "\U0001f600", "  ", "\n\n", "A", "\u00df", "12", "<|im_end|>", "<b>", "\u4e2d",
    "{{ x }}", "\\n", '"', "\u200d", "\u0645", "\u2028",
)  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look_up", "description": "", "parameters": {"type": "object"}}}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def rows(count: int, seed: int) -> Iterator[dict]:
    """Yields preference rows whose responses part at any turn."""
    for number in range(count):
        yield _Row(random.Random(f"{seed} {number}")).row()


class _Row:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.has_tools = rng.random() < 0.3
        self.thinks = rng.random() < 0.4

    def row(self) -> dict:
        rng = self.rng
        prompt = [self.turn("user")]
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            prompt += [*self.answer(), self.turn("user")]
        if rng.random() < 0.3:
            prompt.insert(0, self.turn("system"))
        if rng.random() < 0.1:
            prompt += self.answer(calls=True)[:-1]
        row = {"chosen": prompt + self.response(), "rejected": prompt + self.response()}
        return row | ({"tools": [copy.deepcopy(TOOL)]} if self.has_tools else {})

    def response(self) -> list[dict]:
        turns = self.answer()
        for _ in range(self.rng.choice((0, 0, 0, 1, 2))):
            turns += [self.turn("user"), *self.answer()]
        written = [turn for turn in turns if turn["role"] == "assistant"]
        if len(written) > 1 and self.rng.random() < 0.3:
            self.rng.choice(written).update(self.rng.choice(({"weight": 0}, {"train": False}, {"loss": False})))
        return turns

    def answer(self, calls: bool = False) -> list[dict]:
        turns = []
        if calls or (self.has_tools and self.rng.random() < 0.5):
            call = {"type": "function", "function": {"name": "look_up", "arguments": {"what": self.text()}}}
            turns += [self.turn("assistant", tool_calls=[call]) | {"content": self.rng.choice((None, "", self.text()))},
                      self.turn("tool")]  # fmt: skip
        return [*turns, self.turn("assistant")]

    def turn(self, role: str, **more: object) -> dict:
        turn = {"role": role, "content": self.text(), **more}
        if role == "assistant" and self.thinks and self.rng.random() < 0.7:
            if self.rng.random() < 0.5:
                turn[self.rng.choice(REASONING_KEYS)] = self.text()
            elif "tool_calls" not in more:
                blanks = self.rng.choice(("", "\n"))
                turn["content"] = f"<think>{blanks}{self.text()}{blanks}</think>{2 * blanks}{turn['content']}"
        if self.rng.random() < 0.1 and isinstance(turn["content"], str):
            middle = self.rng.randrange(len(turn["content"]) + 1)
            pieces = turn["content"][:middle], turn["content"][middle:]
            turn["content"] = [{"type": "text", "text": piece} for piece in pieces]
        return turn

    def text(self) -> str:
        words = " ".join(self.rng.choices(WORDS, k=self.rng.randint(0, 6)))
        end = self.rng.choice((".", " ", "\n"))
        return f"a{words}{end}{self.rng.randrange(10**9, 10**10)}n"
