"""Conversations rendered by a chat template, with a mark in front of each special token that the template writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from simpo_megatron.data.bounded_dict import BoundedDict
from simpo_megatron.data.records import CONTENT_MARK, TEMPLATE_MARK, BadRecord, Message, says_more
from simpo_megatron.data.rendering.coverage import check_conversation
from simpo_megatron.data.rendering.templates import ChatTemplate, EndlessTemplateError, special_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MarkedRenderer:
    """Renders conversations by a chat template; TEMPLATE_MARK precedes the special tokens that the template writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        # They load Jinja.
        from simpo_megatron.data.rendering.framed_pairs import FramedPairs
        from simpo_megatron.data.rendering.template_frames import TemplateFrames

        specials = special_texts(tokenizer)
        self._template = template
        self._frames = TemplateFrames(template)
        self.framed_pairs = FramedPairs(self._frames, specials, TEMPLATE_MARK)
        self._specials = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        marked = "|".join(re.escape(TEMPLATE_MARK + text) for text in specials) or r"(?!)"
        self.special = re.compile(marked)
        """A special token, with its mark."""
        self.closing = re.compile(rf"(?:\s*(?:{marked}))+\s*\Z")
        """The end of a turn: special tokens and blanks, with nothing behind them."""
        self._left_out: BoundedDict[tuple, frozenset[int]] = BoundedDict()

    def as_text(self, value: Any) -> Any:
        """Returns JSON values in which the texts of special tokens are broken, so that they stay text."""
        if isinstance(value, str):
            return self._specials.sub(lambda found: found.group()[0] + CONTENT_MARK + found.group()[1:], value)
        if isinstance(value, (list, tuple)):
            return [self.as_text(item) for item in value]
        return {key: self.as_text(item) for key, item in value.items()} if isinstance(value, dict) else value

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict] | None, *, add_generation_prompt: bool = False
    ) -> str:
        """Returns the text of a conversation, its special tokens marked."""
        return self._marked(self._template.render(messages, tools, add_generation_prompt=add_generation_prompt))

    def render_answers(
        self, asked: Sequence[tuple[Sequence[Message], Sequence[Message]]]
    ) -> list[tuple[str, list[str]] | None]:
        """Returns, for each (messages, turns) without tools, the texts that its responses are found in;
        None where the template fails.

        That is the prompt that asks for a response to the messages, and the conversation with each of `turns` as it.
        """
        if not asked:
            return []
        try:
            prompts = self._render_all([messages for messages, _ in asked], add_generation_prompt=True)
            wholes = self._render_all([[*before, turn] for before, turns in asked for turn in turns])
        except EndlessTemplateError:
            return [None] * len(asked)
        except BadRecord:
            half = len(asked) // 2
            return [*self.render_answers(asked[:half]), *self.render_answers(asked[half:])] if half else [None]
        of_turns = map(self._marked, wholes)
        return [
            (self._marked(prompt), list(islice(of_turns, len(turns))))
            for prompt, (_, turns) in zip(prompts, asked, strict=True)
        ]

    def last_special(self, text: str, end: int) -> int | None:
        """Returns where the last special token of `text[:end]` ends."""
        ends = [found.end() for found in self.special.finditer(text, 0, end)]
        return ends[-1] if ends else None

    def check(self, rendered: str, messages: Sequence[Message], tools: Sequence[dict] | None) -> set[str]:
        """Returns the findings about a rendered prompt. Raises: BadRecord where the template leaves out text."""
        for index in sorted(self._turns_left_out(messages, tools)):
            role = messages[index]["role"]
            raise BadRecord(
                "template_leaves_out", f"the chat template leaves out a turn of {role}; give another chat_template"
            )
        return check_conversation(rendered, messages, tools)

    def _render_all(
        self, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool = False
    ) -> list[str]:
        """Returns the texts of conversations without tools: by frames, and else by the template itself."""
        texts = [
            self._frames.render(messages, add_generation_prompt=add_generation_prompt) for messages in conversations
        ]
        left = [messages for messages, text in zip(conversations, texts, strict=True) if text is None]
        others = iter(self._template.render_all(left, add_generation_prompt=add_generation_prompt) if left else ())
        return [next(others) if text is None else text for text in texts]

    def _marked(self, rendered: str) -> str:
        return self._specials.sub(lambda found: TEMPLATE_MARK + found[0], rendered)

    def _turns_left_out(self, messages: Sequence[Message], tools: Sequence[dict] | None) -> frozenset[int]:
        """Returns which turns the template has no place for, whatever they say; asked once for each order of roles."""
        shape = (bool(tools), *((turn["role"], bool(turn["content"].strip()), says_more(turn)) for turn in messages))
        if shape not in self._left_out:
            names = {
                i: f"{CONTENT_MARK}{i}{CONTENT_MARK}" for i, turn in enumerate(messages) if turn["content"].strip()
            }
            asked = [{**turn, "content": names.get(i, turn["content"])} for i, turn in enumerate(messages)]
            try:
                rendered = self._template.render(asked, tools)
                left_out = frozenset(i for i, name in names.items() if name not in rendered)
            except BadRecord:
                left_out = frozenset()
            self._left_out[shape] = left_out
        return self._left_out[shape]
