"""Turns of the assistant in a rendered conversation: where each begins and ends, proven from renderings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from simpo_megatron.data.coverage import check_conversation, check_turn
from simpo_megatron.data.findings import EMPTY_REASONING, split_reasoning
from simpo_megatron.data.records import BadRecord, Message
from simpo_megatron.data.templates import ChatTemplate, EndlessTemplateError, special_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Unicode noncharacters, refused in records, so they can mark what belongs to whom in a rendered text.
TEMPLATE_MARK = "\ufdd0"
CONTENT_MARK = "\ufdd1"

Spans = tuple[tuple[int, int], ...]
"""Pieces of a text, (start, end) of each, in order."""

_MAX_SHAPES = 4096


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation up to the end token of its last turn, and where the turns stand that are trained on."""

    text: str
    spans: Spans
    findings: frozenset[str] = frozenset()

    def spans_from(self, start: int, *, with_first: bool) -> Spans:
        """Returns the spans in the text behind `start`, CONTENT_MARKs left out.

        Args:
            with_first: whether the first one begins there, and not where it stands.
        """
        first, *others = self.spans
        spans = ((start, first[1]) if with_first else first, *others)
        return tuple((self._unmarked(start, begin), self._unmarked(start, end)) for begin, end in spans)

    def _unmarked(self, start: int, end: int) -> int:
        return end - start - self.text.count(CONTENT_MARK, start, end)


@dataclass(frozen=True)
class _Place:
    """A turn of the assistant, the turns before it and the tools that it may call."""

    before: Sequence[Message]
    turn: Message
    tools: Sequence[dict] | None

    @cached_property
    def answer(self) -> str:
        """The turn's text without its reasoning and blanks around it; of a turn that calls, where it stands is open."""
        return "" if self.turn.get("tool_calls") else split_reasoning(self.turn["content"])[1]


@dataclass(frozen=True)
class _Response:
    """One rendered turn of the assistant, and the prompt in front of it."""

    prompt: str
    text: str
    findings: frozenset[str] = frozenset()

    def in_conversation(self) -> Conversation:
        """Returns the prompt with this one turn behind it."""
        whole = self.prompt + self.text
        return Conversation(whole, ((len(self.prompt), len(whole)),), self.findings)


class TurnRenderer:
    """Renders conversations by a chat template; TEMPLATE_MARK precedes the special tokens that the template writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        # They load Jinja.
        from simpo_megatron.data.framed_pairs import FramedPairs
        from simpo_megatron.data.template_frames import TemplateFrames

        specials = special_texts(tokenizer)
        self._template = template
        self._frames = TemplateFrames(template)
        self.framed_pairs = FramedPairs(self._frames, specials, TEMPLATE_MARK)
        self._specials = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        marked = "|".join(re.escape(TEMPLATE_MARK + text) for text in specials) or r"(?!)"
        # The end of a turn: special tokens and blanks, with nothing behind them.
        self._closing = re.compile(rf"(?:\s*(?:{marked}))+\s*\Z")
        self._special = re.compile(marked)
        self._left_out: dict[tuple, frozenset[int]] = {}

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
        """Returns, for each (messages, turns) without tools, what `answers` begins with; None where the template fails.

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

    def answers(
        self,
        messages: Sequence[Message],
        turns: Sequence[Message],
        tools: Sequence[dict] | None,
        rendered: tuple[str, list[str]] | None = None,
    ) -> tuple[Conversation, ...]:
        """Returns the conversation with each of `turns` as the one response to `messages`.

        Args:
            rendered: of `render_answers`, where it is there already.

        Raises: BadRecord template_mismatch, where nothing shows where a turn begins; template_leaves_out.
        """
        if rendered is None:
            opened = self.render(messages, tools, add_generation_prompt=True)
            rendered = opened, [self.render([*messages, turn], tools) for turn in turns]
        opened, wholes = rendered
        findings = self.check(opened, messages, tools)
        responses = [
            self._respond(_Place(messages, turn, tools), opened, whole).in_conversation()
            for turn, whole in zip(turns, wholes, strict=True)
        ]
        return tuple(Conversation(found.text, found.spans, found.findings | findings) for found in responses)

    def _marked(self, rendered: str) -> str:
        return self._specials.sub(lambda found: TEMPLATE_MARK + found[0], rendered)

    def converse(
        self, messages: Sequence[Message], turns: Sequence[Message], tools: Sequence[dict] | None
    ) -> Conversation:
        """Returns the conversation with all of `turns` as the response, and where the assistant's stand in it.

        Raises: BadRecord template_mismatch, where nothing shows where a turn begins or ends; template_leaves_out.
        """
        last = _Place([*messages, *turns[:-1]], turns[-1], tools)
        opened = self.render(last.before, tools, add_generation_prompt=True)
        response = self._respond(last, opened, self.render([*last.before, last.turn], tools))
        findings = response.findings | self.check(response.prompt, last.before, tools)
        spans: list[tuple[int, int]] = []
        for number, turn in enumerate(turns[:-1]):
            if turn["role"] == "assistant":
                place = _Place([*messages, *turns[:number]], turn, tools)
                start, end, found = self._find(response.prompt, place, turns[number + 1])
                if spans and start < spans[-1][1]:
                    raise mismatch("the template writes the turns of a response in another order")
                spans.append((start, end))
                findings |= found
        whole = response.in_conversation()
        return Conversation(whole.text, (*spans, *whole.spans), findings)

    def last_special(self, text: str, end: int) -> int | None:
        """Returns where the last special token of `text[:end]` ends."""
        ends = [found.end() for found in self._special.finditer(text, 0, end)]
        return ends[-1] if ends else None

    def check(self, rendered: str, messages: Sequence[Message], tools: Sequence[dict] | None) -> set[str]:
        """Returns the findings about a rendered prompt. Raises: BadRecord where the template leaves out text."""
        for index in sorted(self._turns_left_out(messages, tools)):
            role = messages[index]["role"]
            raise BadRecord(
                "template_leaves_out", f"the chat template leaves out a turn of {role}; give another chat_template"
            )
        return check_conversation(rendered, messages, tools)

    def _respond(self, place: _Place, opened: str, whole: str) -> _Response:
        """Returns a turn, the end of `whole`, behind the part of `opened` that is proven to precede it.

        Args:
            opened: the rendered prompt that asks for the turn.
            whole: the rendered conversation up to the turn.
        """
        if whole.startswith(opened):
            return self._behind(place, opened, whole[len(opened) :])
        start = self._end_of_header(place, opened, whole)
        if start is not None:
            return self._without(place, whole[:start], opened[start:], whole[start:])
        tail = self._behind_shorter_prompt(place, opened, whole)
        if tail is None:
            raise mismatch("the template writes a prompt differently once a response follows it")
        found = self._behind(place, opened, tail)
        return replace(found, findings=found.findings | {"earlier_reasoning_kept"})

    def _end_of_header(self, place: _Place, opened: str, whole: str) -> int | None:
        """Returns where the header ends that `whole` shares with `opened`: there the answer begins.

        Or an empty reasoning does, with which some templates close the one that they open in a prompt. A call without
        a text begins where a text of it would.
        """
        closed, answer = self.render(place.before, place.tools), split_reasoning(place.turn["content"])[1]
        if opened.startswith(closed) and whole.startswith(closed):
            text_at = None if answer or not place.turn.get("tool_calls") else self._place_of_text(place)
            for end in range(len(opened), len(closed), -1):
                if whole.startswith(opened[:end]):
                    rest = whole[end:].lstrip()
                    if end == text_at or (answer and rest.startswith(answer)) or EMPTY_REASONING.match(rest):
                        return end
        return None

    def _place_of_text(self, place: _Place) -> int | None:
        """Returns where the template would write a text of a turn that has none; None where that changes the rest."""
        marked = self.render([*place.before, {**place.turn, "content": CONTENT_MARK}], place.tools)
        before, mark, behind = marked.rpartition(CONTENT_MARK)
        is_proven = mark and before + behind == self.render([*place.before, place.turn], place.tools)
        return len(before) if is_proven else None

    def _behind_shorter_prompt(self, place: _Place, opened: str, whole: str) -> str | None:
        """Returns what `whole` has behind a prompt from which the template leaves out what led to earlier calls.

        Templates such as gpt-oss's keep the reasoning of a call until the call has its answer. The prompt that asks
        for the answer has it, the conversation with the answer does not. None where `whole` is not what the template
        writes of the turns without it, or the two prompts end in different headers.
        """
        without_reasoning = [{k: v for k, v in turn.items() if k != "reasoning_content"} for turn in place.before]
        calls_alone = [{**turn, "content": ""} if turn.get("tool_calls") else turn for turn in without_reasoning]
        header = opened.removeprefix(self.render(place.before, place.tools))
        for before in (without_reasoning, calls_alone):
            if before == list(place.before) or self.render([*before, place.turn], place.tools) != whole:
                continue
            shorter = self.render(before, place.tools, add_generation_prompt=True)
            if whole.startswith(shorter) and header == shorter.removeprefix(self.render(before, place.tools)):
                return whole[len(shorter) :]
        return None

    def _behind(self, place: _Place, prompt: str, tail: str) -> _Response:
        """Returns the response in `tail`, which the template puts behind `prompt`."""
        text = self._until_end_token(place, tail)
        # A reasoning that the prompt opens begins there.
        _, findings = check_turn(text, 0, place.turn)
        if "reasoning_left_out" in findings:
            return self._without(place, prompt, "", tail)
        is_closed_at_once = text.lstrip().startswith("</think>")
        if is_closed_at_once or (EMPTY_REASONING.search(text) and not EMPTY_REASONING.search(place.turn["content"])):
            findings.add("empty_reasoning")
        return _Response(prompt, text, frozenset(findings))

    def _without(self, place: _Place, prompt: str, waits: str, tail: str) -> _Response:
        """Returns a response of which the template leaves out the reasoning, with it, or that has none to go on from.

        Args:
            waits: what the rendered prompt has more than `prompt`, such as an opened reasoning.
            tail: what the template writes behind `prompt`.
        """
        turn, tail = place.turn, tail.lstrip()
        reasoning, answer = split_reasoning(turn["content"])
        if waits and EMPTY_REASONING.match(tail) and not (reasoning or turn.get("reasoning_content")):
            text = self._until_end_token(place, tail)
            return _Response(prompt, text, frozenset({"empty_reasoning", *check_turn(text, 0, turn)[1]}))
        if turn.get("reasoning_content") or not tail.startswith(answer) or (reasoning and turn.get("tool_calls")):
            raise reasoning_left_out("a")
        if not reasoning:
            text = self._until_end_token(place, tail)
            return _Response(prompt, text, frozenset({"opened_reasoning_left_out", *check_turn(text, 0, turn)[1]}))
        text, mark = turn["content"].strip(), waits.strip()
        if not text.startswith(mark):
            raise reasoning_left_out("a")
        text = text[len(mark) :].lstrip() if mark else text
        end = self._until_end_token(place, tail)[len(answer) :] if answer else ""
        return _Response(prompt + waits, text + end, frozenset({"reasoning_put_back"}))

    def _find(self, text: str, place: _Place, following: Message) -> tuple[int, int, set[str]]:
        """Returns where a turn that is not the last one stands in `text`, and the findings about it.

        It begins where the prompt ends that asks the model for it. It ends with the end token that it has where nothing
        follows it, or with the first one behind its answer: either is in front of all that changes with `following`,
        the turn behind it.
        """
        opened = self.render(place.before, place.tools, add_generation_prompt=True)
        start = len(opened) if text.startswith(opened) else self._end_of_header(place, opened, text)
        if start is None:
            raise mismatch("the template writes a turn of a response otherwise than behind the prompt that asks for it")
        turns = [*place.before, place.turn]
        followed = self.render([*turns, {**following, "content": CONTENT_MARK}], place.tools)
        room = text[start : num_shared(text, followed)]
        alone = self._until_end_token(place, self.render(turns, place.tools))
        if not self._closing.search(alone):
            # The first special token behind an answer would be the next turn's.
            raise mismatch("the template ends a turn of the assistant with no special token")
        written = alone[start:] if alone.startswith(text[:start]) else ""
        if not room.startswith(written):
            # Some templates put an empty reasoning in front of the last turn only.
            written = EMPTY_REASONING.sub("", written, count=1).lstrip()
        if not (written and room.startswith(written)):
            end = self._end_by_mark(text, start, place, following)
            if end is None:
                end = self._end_of_answer(room, place.answer)
                # Where the answer stands twice, nothing shows which one is the turn's.
                is_once = end is not None and self._end_of_answer(room[: end - 1], place.answer) is None
                end = end if is_once else None
            special = None if end is None else self._special.search(room, end)
            if special is None:
                raise mismatch("the template does not show where a turn of a response ends")
            written = room[: special.end()]
        _, findings = check_turn(written, 0, place.turn)
        if "reasoning_left_out" in findings:
            raise reasoning_left_out("a")
        return start, start + len(written), findings | ({"opened_reasoning_left_out"} if len(opened) > start else set())

    def _end_by_mark(self, text: str, start: int, place: _Place, following: Message) -> int | None:
        """Returns where the turn's content ends behind `start`, proven by a mark at its end; None where that fails."""
        content = place.turn["content"].strip()
        if not content or CONTENT_MARK in content:
            return None
        marked_turns = [*place.before, {**place.turn, "content": content + CONTENT_MARK}, following]
        marked = self.render(marked_turns, place.tools)
        end = marked.find(CONTENT_MARK, start)
        return end - start if end >= 0 and marked[:end] == text[:end] else None

    def _until_end_token(self, place: _Place, response: str) -> str:
        """Returns `response` up to and with the special token that ends the turn, where the template writes one."""
        start = self._end_of_answer(response, place.answer)
        if start is None:
            closing = self._closing.search(response)
            start = closing.start() if closing else len(response)
        ends = [special.end() for special in self._special.finditer(response, start)]
        if not ends:
            return response
        end = ends[0]
        if self._closing.match(response, end):
            # A turn may end in several; one that ends the conversation does not stand in front of a next turn.
            followed = self._followed(place)
            end = max([end, *(other for other in ends if response[start:other] in followed)])
        return response[:end]

    def _end_of_answer(self, text: str, answer: str) -> int | None:
        """Returns where `answer` last stands in `text`, behind it; None where it does not.

        A short answer such as `d` may also stand inside a special token, as in `<|im_end|>`; that is none.
        """
        at = text.rfind(answer) if answer else -1
        while at >= 0:
            mark = text.rfind(TEMPLATE_MARK, 0, at)
            special = self._special.match(text, mark) if mark >= 0 else None
            if special is None or special.end() <= at:
                return at + len(answer)
            at = text.rfind(answer, 0, mark + len(answer) - 1)
        return None

    def _followed(self, place: _Place) -> str:
        """Returns the conversation up to what a next turn says, empty where the template allows none."""
        for role in ("tool", "user") if place.turn.get("tool_calls") else ("user",):
            try:
                turns = [*place.before, place.turn, {"role": role, "content": CONTENT_MARK}]
                return self.render(turns, place.tools).rpartition(CONTENT_MARK)[0]
            except BadRecord:
                continue
        return ""

    def _turns_left_out(self, messages: Sequence[Message], tools: Sequence[dict] | None) -> frozenset[int]:
        """Returns which turns the template has no place for, whatever they say; asked once for each order of roles."""
        shape = (bool(tools), *((turn["role"], bool(turn["content"].strip()), says_more(turn)) for turn in messages))
        if shape not in self._left_out:
            if len(self._left_out) >= _MAX_SHAPES:
                self._left_out.clear()
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


def says_more(turn: Message) -> bool:
    """Returns whether a turn calls a tool or has a reasoning beside its text."""
    return any(turn.get(key) for key in ("tool_calls", "reasoning_content"))


def num_shared(text: str, other: str) -> int:
    """Returns how many characters two texts share at their beginning."""
    pairs = zip(text, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))


def mismatch(what: str) -> BadRecord:
    """Returns the error for a boundary that renderings do not show."""
    return BadRecord("template_mismatch", f"{what}; give another chat_template")


def reasoning_left_out(name: str) -> BadRecord:
    """Returns the error for a response without its reasoning."""
    return BadRecord(
        "template_leaves_out", f"the chat template leaves out the reasoning of {name} response; give another one"
    )
