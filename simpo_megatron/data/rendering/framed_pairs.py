"""Pairs joined by frames: what `rendered_turns` proves of each rendering, proven once for all texts in a frame.

Where a template provably only joins texts (`template_frames`), a response begins where the frame of its prompt ends,
and ends with the special token that the frame has behind it. Nothing of that depends on what the texts say, but for a
few texts, such as those with a reasoning; these, and all other templates, are left to `rendered_turns`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from simpo_megatron.data.bounded_dict import BoundedDict
from simpo_megatron.data.records import Message
from simpo_megatron.data.rendering.template_frames import Frame, TemplateFrames
from simpo_megatron.data.rendering.templates import EndlessTemplateError

_REASONING = "think>"


@dataclass(frozen=True)
class _Frame:
    """A prompt and one response as a template writes them, special tokens marked."""

    before: tuple[str, ...]
    """The text in front of each turn, the response's as the last one."""
    is_trimmed: tuple[bool, ...]
    """True for each turn around whose text the template takes away blanks."""
    closing: str
    """The text behind a response, up to the special token that ends the turn."""


class FramedPairs:
    """Joins the texts of pairs whose responses are one turn each.

    Args:
        specials: texts of the tokenizer's special tokens.
        mark: what precedes those of them that the template writes.
    """

    def __init__(self, frames: TemplateFrames, specials: Sequence[str], mark: str) -> None:
        self._frames, self._specials, self._mark = frames, specials, mark
        self._special = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        self._of_roles: BoundedDict[tuple[str, ...], _Frame | None] = BoundedDict()

    def join(self, prompt: Sequence[Message], chosen: Message, rejected: Message) -> tuple[str, str, str] | None:
        """Returns prompt, chosen and rejected as text, special tokens marked, the assistant's header in the prompt.

        None where no frame is proven, or a text might change what is around it.

        Args:
            prompt, chosen, rejected: turns of a role and a text alone; no text holds that of a special token.
        """
        if not chosen["role"] == rejected["role"] == "assistant":
            return None
        roles = tuple([turn["role"] for turn in prompt])
        if roles not in self._of_roles:
            self._of_roles[roles] = self._frame(roles)
        frame = self._of_roles[roles]
        if frame is None:
            return None
        pieces: list[str] = []
        for before, is_trimmed, turn in zip(frame.before, frame.is_trimmed, prompt, strict=False):
            text = turn["content"]
            if not _is_plain(text, is_trimmed):
                return None
            pieces += (before, text)
        joined = ["".join(pieces) + frame.before[-1]]
        for turn in (chosen, rejected):
            text = turn["content"]
            if not _is_plain(text, frame.is_trimmed[-1]) or _REASONING in text:
                return None
            joined.append(text + frame.closing)
        return joined[0], joined[1], joined[2]

    def _frame(self, roles: tuple[str, ...]) -> _Frame | None:
        """Returns the frame of a prompt of these roles and one response; None where it is not proven.

        It is where the conversation continues the prompt, each turn stands in it once and in order, behind the response
        is one special token at most, and no text can make a special token with what is around it.
        """
        try:
            opened = self._frames.of(roles, add_generation_prompt=True)
            whole = self._frames.of((*roles, "assistant"), add_generation_prompt=False)
            closed = self._frames.of(roles, add_generation_prompt=False)
        except EndlessTemplateError:  # The first record that is rendered alone says so.
            return None
        if opened is None or whole is None or whole[: len(opened)] != opened:
            return None
        in_order = list(range(len(roles) + 1))
        if _turns(whole) != in_order or _turns(opened) != in_order[:-1]:
            return None
        if closed is not None and _turns(closed) != in_order[:-1]:
            return None
        *before, behind = (piece for piece in whole if isinstance(piece, str))
        special = self._special.match(behind)
        closing = behind if special is None else special[0]
        if behind.removeprefix("" if special is None else closing).strip():
            return None
        is_apart = all(map(self._ends_apart, before)) and all(map(self._begins_apart, before[1:]))
        if not is_apart or not (behind == "" or self._begins_apart(behind)):
            return None
        *before, closing = (self._special.sub(lambda found: self._mark + found[0], text) for text in (*before, closing))
        return _Frame(tuple(before), tuple(piece[1] for piece in whole if not isinstance(piece, str)), closing)

    def _begins_apart(self, text: str) -> bool:
        """Returns whether no special token can begin in front of `text` and end in it or behind it."""
        ends = (special[cut:] for special in self._specials for cut in range(1, len(special)))
        return not any(text.startswith(end) or end.startswith(text) for end in ends)

    def _ends_apart(self, text: str) -> bool:
        """Returns whether no special token can begin in `text`, or in front of it, and end behind it."""
        begins = (special[:cut] for special in self._specials for cut in range(1, len(special)))
        return text == "" or not any(text.endswith(begin) or begin.endswith(text) for begin in begins)


def _turns(frame: Frame) -> list[int]:
    return [piece[0] for piece in frame if not isinstance(piece, str)]


def _is_plain(text: str, is_trimmed: bool) -> bool:
    """Returns whether a text stands in a frame as it is."""
    stripped = text.strip()
    return bool(stripped) and (not is_trimmed or len(stripped) == len(text))
