"""Pairs as text: a record rendered by a chat template, split where the response begins, in one of two modes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from simpo_megatron.data.coverage import check_conversation, check_turn
from simpo_megatron.data.findings import EMPTY_REASONING, findings_of_texts, split_reasoning
from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records import BadRecord, Message, PreferenceRecord
from simpo_megatron.data.templates import ChatTemplate, as_messages, chat_template_of, special_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Unicode noncharacters, refused in records, so they can mark what belongs to whom in a rendered text.
TEMPLATE_MARK = "\ufdd0"
CONTENT_MARK = "\ufdd1"

_MAX_SHAPES = 4096


@dataclass(frozen=True)
class RenderedPair:
    """A pair as text: each whole text is prompt + response; TEMPLATE_MARK precedes its special tokens."""

    prompt: str
    chosen: str
    rejected: str
    notes: tuple[str, ...] = ()
    """Names of what is to be counted, see FINDINGS."""


@dataclass(frozen=True)
class _Response:
    """One rendered response, and the prompt in front of it."""

    prompt: str
    text: str
    findings: frozenset[str] = frozenset()


class PairRenderer:
    """Renders records with a chat template, or, without one, by plain concatenation.

    Plain concatenation takes a prompt that is a string as it is and puts the response right behind it; a
    conversation becomes `\\n\\nHuman: ...\\n\\nAssistant: ...`. With a template, a prompt that is a string is
    one turn of the user.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: PairOptions) -> None:
        self._bos = tokenizer.bos_token or ""
        template = chat_template_of(tokenizer, options)
        specials = special_texts(tokenizer)
        self._specials = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        marked = "|".join(re.escape(TEMPLATE_MARK + text) for text in specials) or r"(?!)"
        # The end of a turn: special tokens and blanks, with nothing behind them.
        self._closing = re.compile(rf"(?:\s*(?:{marked}))+\s*\Z")
        self._first_special = re.compile(marked)
        self._template = template
        self._left_out: dict[tuple, frozenset[int]] = {}

    def clean(self, record: PreferenceRecord) -> RenderedPair:
        """Returns the pair with the assistant header in the prompt and the template's end token last.

        Raises: BadRecord when a response is nothing but special tokens, the template refuses the conversation or
            leaves out text of it, or no boundary between prompt and response can be proven.
        """
        prompt, responses, findings = self._texts(record)
        for name, turns in zip(("chosen", "rejected"), responses, strict=True):
            texts = "".join(turn["content"] for turn in turns)
            if texts and not self._specials.sub("", texts).strip() and not _says_more(turns[-1]):
                raise BadRecord(f"empty_{name}", f"the {name} response holds nothing but special tokens")
        if self._template is None:
            return self._plain(record, findings)
        messages, tools = self._as_text(prompt), self._as_text(record.tools)
        opened = self._render(messages, tools, add_generation_prompt=True)
        findings |= self._checked(opened, messages, tools)
        chosen, rejected = (self._respond(messages, self._as_text(turns), tools, opened) for turns in responses)
        # A reasoning that the template opens is part of the prompt only where both responses go on from it.
        shared = min(chosen.prompt, rejected.prompt, key=len)
        notes = findings | chosen.findings | rejected.findings
        marked = (shared, *(response.prompt[len(shared) :] + response.text for response in (chosen, rejected)))
        plain = [text.replace(CONTENT_MARK, "") for text in marked]
        return RenderedPair(plain[0], plain[1], plain[2], tuple(sorted(notes)))

    def princeton(self, record: PreferenceRecord) -> RenderedPair:
        """Returns the pair with the assistant header in the response, as the paper's code renders it.

        Special-token text in a record becomes special tokens, and an empty system turn precedes the prompt
        where the template speaks of system turns: both are what the published runs did.
        Source: princeton-nlp/SimPO, scripts/run_simpo.py, apply_chat_template for task simpo.

        Raises: BadRecord when the template refuses the conversation or leaves out text of it.
        """
        assert self._template is not None, "chat_template_of refuses princeton without one"
        prompt, responses, findings = self._texts(record)
        messages, source = list(prompt), self._template.default
        if messages[0]["role"] != "system" and ("system" in source or "<|im_start|>" in source):
            messages.insert(0, {"role": "system", "content": ""})
        rendered = self._template.render(messages, record.tools)
        findings |= self._checked(rendered, messages, record.tools)
        texts = [self._template.render(turns).removeprefix(self._bos) for turns in responses]
        for name, text, turns in zip(("chosen", "rejected"), texts, responses, strict=True):
            found = check_turn(text, 0, turns[-1])[1]
            if "reasoning_left_out" in found:
                raise _reasoning_left_out(name)
            findings |= found
        return RenderedPair(rendered, texts[0], texts[1], tuple(sorted(findings)))

    def _texts(self, record: PreferenceRecord) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...], set[str]]:
        """Returns the turns of the prompt and of both responses, and the findings of their texts."""
        prompt = as_messages(record.prompt)
        responses = tuple(as_messages(response, "assistant") for response in (record.chosen, record.rejected))
        if any(len(turns) != 1 for turns in responses):
            raise BadRecord("several_turns", "a response is several turns, expected one turn of the assistant")
        findings = set(findings_of_texts(record, prompt, responses))
        if any(self._specials.search(turn["content"]) for turn in (*prompt, *responses[0], *responses[1])):
            findings.add("special_token_text")
        return prompt, responses, findings

    def _plain(self, record: PreferenceRecord, findings: set[str]) -> RenderedPair:
        turns = () if isinstance(record.prompt, str) else record.prompt
        chosen, rejected = record.chosen, record.rejected
        if not (isinstance(chosen, str) and isinstance(rejected, str)) or record.tools or any(map(_says_more, turns)):
            raise BadRecord("needs_template", "tools, calls and reasoning have no form without a chat template")
        notes = tuple(sorted(findings))
        if isinstance(record.prompt, str):
            return RenderedPair(record.prompt, chosen, rejected, notes)
        speakers = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}
        texts = [f"\n\n{speakers[turn['role']]}: {turn['content']}" for turn in record.prompt]
        return RenderedPair("".join(texts) + "\n\nAssistant:", " " + chosen, " " + rejected, notes)

    def _respond(
        self, messages: list[Message], turns: list[Message], tools: list[dict] | None, opened: str
    ) -> _Response:
        """Returns a response behind the part of `opened`, the rendered prompt, that is proven to precede it."""
        whole = self._render([*messages, *turns], tools)
        if whole.startswith(opened):
            return self._behind(opened, whole[len(opened) :], turns[-1])
        closed = self._render(messages, tools)
        header = opened[len(closed) :]
        rest = whole[len(closed) :]
        if opened.startswith(closed) and whole.startswith(closed):
            answer = split_reasoning(turns[-1]["content"])[1]
            # The header that whole and prompt share ends where the answer begins.
            for cut in range(len(header), 0, -1):
                if answer and rest.startswith(header[:cut]) and rest[cut:].lstrip().startswith(answer):
                    return self._without(closed + header[:cut], header[cut:], rest[cut:], turns[-1])
        raise BadRecord(
            "template_mismatch",
            "the template writes a prompt differently once a response follows it; give another chat_template",
        )

    def _behind(self, prompt: str, tail: str, turn: Message) -> _Response:
        """Returns the response in `tail`, which the template puts behind `prompt`."""
        text = self._until_end_token(tail, turn)
        # A reasoning that the prompt opens begins there.
        _, findings = check_turn(text, 0, turn)
        if "reasoning_left_out" in findings:
            return self._without(prompt, "", tail, turn)
        if EMPTY_REASONING.search(text) and not EMPTY_REASONING.search(turn["content"]):
            findings.add("empty_reasoning")
        return _Response(prompt, text, frozenset(findings))

    def _without(self, prompt: str, waits: str, tail: str, turn: Message) -> _Response:
        """Returns a response of which the template leaves out the reasoning, with it, or that has none to go on from.

        Args:
            waits: what the rendered prompt has more than `prompt`, such as an opened reasoning.
            tail: what the template writes behind `prompt`.
        """
        reasoning, answer = split_reasoning(turn["content"])
        tail = tail.lstrip()
        if turn.get("reasoning_content") or turn.get("tool_calls") or not tail.startswith(answer):
            raise _reasoning_left_out("a")
        if not reasoning:
            return _Response(prompt, self._until_end_token(tail, turn), frozenset({"opened_reasoning_left_out"}))
        text, mark = turn["content"].strip(), waits.strip()
        if not text.startswith(mark):
            raise _reasoning_left_out("a")
        text = text[len(mark) :].lstrip() if mark else text
        end = self._until_end_token(tail, turn)[len(answer) :] if answer else ""
        return _Response(prompt + waits, text + end, frozenset({"reasoning_put_back"}))

    def _until_end_token(self, response: str, turn: Message) -> str:
        """Returns `response` up to and with the special token that ends the turn, where the template writes one."""
        answer = split_reasoning(turn["content"])[1]
        start = response.rfind(answer) if answer and not turn.get("tool_calls") else -1
        if start >= 0:
            special = self._first_special.search(response, start + len(answer))
        else:
            closing = self._closing.search(response)
            special = closing and self._first_special.search(response, closing.start())
        return response[: special.end()] if special else response

    def _checked(self, rendered: str, messages: Sequence[Message], tools: Sequence[dict] | None) -> set[str]:
        """Returns the findings about a rendered prompt. Raises: BadRecord where the template leaves out text."""
        for index in sorted(self._turns_left_out(messages, tools)):
            role = messages[index]["role"]
            raise BadRecord(
                "template_leaves_out", f"the chat template leaves out a turn of {role}; give another chat_template"
            )
        return check_conversation(rendered, messages, tools)

    def _turns_left_out(self, messages: Sequence[Message], tools: Sequence[dict] | None) -> frozenset[int]:
        """Returns which turns the template has no place for, whatever they say; asked once for each order of roles."""
        shape = (bool(tools), *((turn["role"], bool(turn["content"].strip()), _says_more(turn)) for turn in messages))
        if shape not in self._left_out:
            if len(self._left_out) >= _MAX_SHAPES:
                self._left_out.clear()
            names = {
                i: f"{CONTENT_MARK}{i}{CONTENT_MARK}" for i, turn in enumerate(messages) if turn["content"].strip()
            }
            asked = [{**turn, "content": names.get(i, turn["content"])} for i, turn in enumerate(messages)]
            try:
                rendered = cast(ChatTemplate, self._template).render(asked, tools)
                left_out = frozenset(i for i, name in names.items() if name not in rendered)
            except BadRecord:
                left_out = frozenset()
            self._left_out[shape] = left_out
        return self._left_out[shape]

    def _as_text(self, value: Any) -> Any:
        """Returns JSON values in which the texts of special tokens are broken, so that they stay text."""
        if isinstance(value, str):
            return self._specials.sub(lambda found: found.group()[0] + CONTENT_MARK + found.group()[1:], value)
        if isinstance(value, (list, tuple)):
            return [self._as_text(item) for item in value]
        return {key: self._as_text(item) for key, item in value.items()} if isinstance(value, dict) else value

    def _render(self, messages: list[Message], tools: list[dict] | None, add_generation_prompt: bool = False) -> str:
        assert self._template is not None, "what has no template is concatenated"
        rendered = self._template.render(messages, tools, add_generation_prompt=add_generation_prompt)
        return self._specials.sub(lambda found: TEMPLATE_MARK + found.group(), rendered)


def _says_more(turn: Message) -> bool:
    return any(turn.get(key) for key in ("tool_calls", "reasoning_content"))


def _reasoning_left_out(name: str) -> BadRecord:
    return BadRecord(
        "template_leaves_out", f"the chat template leaves out the reasoning of {name} response; give another one"
    )
