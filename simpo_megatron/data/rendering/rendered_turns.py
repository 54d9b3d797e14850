"""Turns of the assistant in a rendered conversation: where each begins and ends, proven from renderings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from simpo_megatron.data.records import CONTENT_MARK, TEMPLATE_MARK, BadRecord, Message
from simpo_megatron.data.rendering.coverage import check_turn
from simpo_megatron.data.rendering.findings import EMPTY_REASONING, split_reasoning
from simpo_megatron.data.rendering.marked_rendering import MarkedRenderer

Spans = tuple[tuple[int, int], ...]
"""Pieces of a text, (start, end) of each, in order."""


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


class TurnFinder:
    """Finds the turns of the assistant in the conversations that a chat template writes."""

    def __init__(self, renderer: MarkedRenderer) -> None:
        self._renderer, self._render = renderer, renderer.render

    def answers(
        self,
        messages: Sequence[Message],
        turns: Sequence[Message],
        tools: Sequence[dict] | None,
        rendered: tuple[str, list[str]] | None = None,
    ) -> tuple[Conversation, ...]:
        """Returns the conversation with each of `turns` as the one response to `messages`.

        Args:
            rendered: of `MarkedRenderer.render_answers`, where it is there already.

        Raises: BadRecord template_mismatch, where nothing shows where a turn begins; template_leaves_out.
        """
        if rendered is None:
            opened = self._render(messages, tools, add_generation_prompt=True)
            rendered = opened, [self._render([*messages, turn], tools) for turn in turns]
        opened, wholes = rendered
        findings = self._renderer.check(opened, messages, tools)
        responses = [
            self._respond(_Place(messages, turn, tools), opened, whole).in_conversation()
            for turn, whole in zip(turns, wholes, strict=True)
        ]
        return tuple(Conversation(found.text, found.spans, found.findings | findings) for found in responses)

    def converse(
        self, messages: Sequence[Message], turns: Sequence[Message], tools: Sequence[dict] | None
    ) -> Conversation:
        """Returns the conversation with all of `turns` as the response, and where the assistant's stand in it.

        Raises: BadRecord template_mismatch, where nothing shows where a turn begins or ends; template_leaves_out.
        """
        last = _Place([*messages, *turns[:-1]], turns[-1], tools)
        opened = self._render(last.before, tools, add_generation_prompt=True)
        response = self._respond(last, opened, self._render([*last.before, last.turn], tools))
        findings = response.findings | self._renderer.check(response.prompt, last.before, tools)
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
        closed, answer = self._render(place.before, place.tools), split_reasoning(place.turn["content"])[1]
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
        marked = self._render([*place.before, {**place.turn, "content": CONTENT_MARK}], place.tools)
        before, mark, behind = marked.rpartition(CONTENT_MARK)
        is_proven = mark and before + behind == self._render([*place.before, place.turn], place.tools)
        return len(before) if is_proven else None

    def _behind_shorter_prompt(self, place: _Place, opened: str, whole: str) -> str | None:
        """Returns what `whole` has behind a prompt from which the template leaves out what led to earlier calls.

        Templates such as gpt-oss's keep the reasoning of a call until the call has its answer. The prompt that asks
        for the answer has it, the conversation with the answer does not. None where `whole` is not what the template
        writes of the turns without it, or the two prompts end in different headers.
        """
        without_reasoning = [{k: v for k, v in turn.items() if k != "reasoning_content"} for turn in place.before]
        calls_alone = [{**turn, "content": ""} if turn.get("tool_calls") else turn for turn in without_reasoning]
        header = opened.removeprefix(self._render(place.before, place.tools))
        for before in (without_reasoning, calls_alone):
            if before == list(place.before) or self._render([*before, place.turn], place.tools) != whole:
                continue
            shorter = self._render(before, place.tools, add_generation_prompt=True)
            if whole.startswith(shorter) and header == shorter.removeprefix(self._render(before, place.tools)):
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
        opened = self._render(place.before, place.tools, add_generation_prompt=True)
        start = len(opened) if text.startswith(opened) else self._end_of_header(place, opened, text)
        if start is None:
            raise mismatch("the template writes a turn of a response otherwise than behind the prompt that asks for it")
        turns = [*place.before, place.turn]
        followed = self._render([*turns, {**following, "content": CONTENT_MARK}], place.tools)
        room = text[start : num_shared(text, followed)]
        alone = self._until_end_token(place, self._render(turns, place.tools))
        if not self._renderer.closing.search(alone):
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
            special = None if end is None else self._renderer.special.search(room, end)
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
        marked = self._render(marked_turns, place.tools)
        end = marked.find(CONTENT_MARK, start)
        return end - start if end >= 0 and marked[:end] == text[:end] else None

    def _until_end_token(self, place: _Place, response: str) -> str:
        """Returns `response` up to and with the special token that ends the turn, where the template writes one."""
        start = self._end_of_answer(response, place.answer)
        if start is None:
            closing = self._renderer.closing.search(response)
            start = closing.start() if closing else len(response)
        ends = [special.end() for special in self._renderer.special.finditer(response, start)]
        if not ends:
            return response
        end = ends[0]
        if self._renderer.closing.match(response, end):
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
            special = self._renderer.special.match(text, mark) if mark >= 0 else None
            if special is None or special.end() <= at:
                return at + len(answer)
            at = text.rfind(answer, 0, mark + len(answer) - 1)
        return None

    def _followed(self, place: _Place) -> str:
        """Returns the conversation up to what a next turn says, empty where the template allows none."""
        for role in ("tool", "user") if place.turn.get("tool_calls") else ("user",):
            try:
                turns = [*place.before, place.turn, {"role": role, "content": CONTENT_MARK}]
                return self._render(turns, place.tools).rpartition(CONTENT_MARK)[0]
            except BadRecord:
                continue
        return ""


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
