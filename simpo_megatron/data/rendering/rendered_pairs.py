"""Pairs as text: a record rendered by a chat template, split where the response begins, in one of two modes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records import (
    CONTENT_MARK,
    BadRecord,
    Message,
    PreferenceRecord,
    UntrainedTurn,
    as_messages,
    is_text_alone,
    says_more,
)
from simpo_megatron.data.rendering.coverage import check_turn
from simpo_megatron.data.rendering.findings import findings_of_texts, has_template_marks
from simpo_megatron.data.rendering.marked_rendering import MarkedRenderer
from simpo_megatron.data.rendering.rendered_turns import (
    Conversation,
    Spans,
    TurnFinder,
    mismatch,
    num_shared,
    reasoning_left_out,
)
from simpo_megatron.data.rendering.templates import chat_template_of, special_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")


@dataclass(frozen=True)
class RenderedPair:
    """A pair as text: each whole text is prompt + response; TEMPLATE_MARK precedes its special tokens."""

    prompt: str
    chosen: str
    rejected: str
    notes: tuple[str, ...] = ()
    """Names of what is to be counted, see FINDINGS."""
    spans: tuple[Spans, Spans] | None = None
    """The spans of the counted turns in chosen and in rejected; None: each is one turn of the assistant."""


@dataclass(frozen=True)
class _Asked:
    """A record as turns, and the same turns for the template, with the texts of special tokens broken up."""

    record: PreferenceRecord
    responses: tuple[tuple[Message, ...], ...]
    findings: set[str]
    prompt: list[Message] = field(default_factory=list)
    chosen: list[Message] = field(default_factory=list)
    rejected: list[Message] = field(default_factory=list)
    tools: list[dict] | None = None

    @property
    def has_one_turn_each(self) -> bool:
        """Both responses are one turn."""
        return len(self.responses[0]) == len(self.responses[1]) == 1


class PairRenderer:
    """Renders records with a chat template, or, without one, by plain concatenation.

    Plain concatenation appends the response directly to a string prompt; a conversation becomes
    `\\n\\nHuman: ...\\n\\nAssistant: ...`. With a template, a string prompt is one turn of the user.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: PairOptions) -> None:
        self._is_princeton = options.template_mode == "princeton"
        self._bos = tokenizer.bos_token or ""
        self._template = chat_template_of(tokenizer, options)
        self._marked = None if self._template is None else MarkedRenderer(tokenizer, self._template)
        self._turns = None if self._marked is None else TurnFinder(self._marked)
        self._specials = re.compile("|".join(map(re.escape, special_texts(tokenizer))) or r"(?!)")

    def render(self, records: Sequence[PreferenceRecord]) -> Iterator[RenderedPair | BadRecord]:
        """Yields each record as text by the template_mode, or the BadRecord that says why it cannot be.

        Raises: EndlessTemplateError.
        """
        if self._is_princeton:
            yield from (_attempted(self._princeton, record) for record in records)
            return
        asked = [_attempted(self._asked, record) for record in records]
        ahead = self._rendered_ahead(asked)
        for place, found in enumerate(asked):
            if isinstance(found, _Asked):
                yield _attempted(self._clean, found, ahead.get(place))
            else:
                yield found

    def _asked(self, record: PreferenceRecord) -> _Asked | RenderedPair:
        """Returns the record as turns, or already as text where a frame shows how.

        Raises: BadRecord when a response is nothing but special tokens.
        """
        prompt, responses, findings = self._texts(record)
        if "special_token_text" in findings:
            self._refuse_specials_alone(responses)
        elif not record.tools and all(map(is_text_alone, chain(prompt, *responses))):
            if self._marked is not None and len(responses[0]) == len(responses[1]) == 1:
                joined = self._marked.framed_pairs.join(prompt, responses[0][0], responses[1][0])
                if joined is not None:
                    return RenderedPair(*joined, notes=tuple(sorted(findings)))
            return _Asked(record, responses, findings, list(prompt), *map(list, responses))
        if self._marked is None:
            return _Asked(record, responses, findings)
        return _Asked(record, responses, findings, *map(self._marked.as_text, (prompt, *responses, record.tools)))

    def _refuse_specials_alone(self, responses: Sequence[Sequence[Message]]) -> None:
        for name, turns in zip(("chosen", "rejected"), responses, strict=True):
            texts = "".join(turn["content"] for turn in turns if turn["role"] == "assistant")
            if texts and not self._specials.sub("", texts).strip() and not any(map(says_more, turns)):
                raise BadRecord(f"empty_{name}", f"the {name} response holds nothing but special tokens")

    def _rendered_ahead(
        self, asked: Sequence[_Asked | RenderedPair | BadRecord]
    ) -> dict[int, tuple[str, list[str]] | None]:
        """Returns the renderings of most records by their places, made in one call, which is faster."""
        if self._marked is None:
            return {}
        most = {
            place: (found.prompt, [*found.chosen, *found.rejected])
            for place, found in enumerate(asked)
            if isinstance(found, _Asked) and found.has_one_turn_each and not found.tools
        }
        return dict(zip(most, self._marked.render_answers(list(most.values())), strict=True))

    def _clean(self, asked: _Asked, rendered: tuple[str, list[str]] | None) -> RenderedPair:
        """Returns the pair with the assistant header in the prompt and the template's end token last.

        Raises: BadRecord when the template refuses the conversation or leaves out text of it, or no boundary between
            prompt and response can be proven.
        """
        if self._turns is None:
            return self._plain(asked.record, asked.findings)
        turns = asked.chosen, asked.rejected
        if asked.has_one_turn_each:
            both = [*asked.chosen, *asked.rejected]
            chosen, rejected = self._turns.answers(asked.prompt, both, asked.tools, rendered)
        else:
            chosen, rejected = (self._turns.converse(asked.prompt, response, asked.tools) for response in turns)
        both_answer = all(response[0]["role"] == "assistant" for response in turns)
        start = self._end_of_prompt(chosen, rejected, both_answer)
        marked = chosen.text[:start], chosen.text[start:], rejected.text[start:]
        prompt_text, chosen_text, rejected_text = (text.replace(CONTENT_MARK, "") for text in marked)
        notes, spans = tuple(sorted(asked.findings | chosen.findings | rejected.findings)), None
        if not asked.has_one_turn_each:
            chosen_spans, rejected_spans = (
                _trained(found.spans_from(start, with_first=both_answer), response)
                for found, response in zip((chosen, rejected), asked.responses, strict=True)
            )
            spans = chosen_spans, rejected_spans
            # No counted token attends to turns after the last counted one, so they are cut.
            chosen_text, rejected_text = chosen_text[: chosen_spans[-1][1]], rejected_text[: rejected_spans[-1][1]]
        return RenderedPair(prompt_text, chosen_text, rejected_text, notes, spans)

    def _princeton(self, record: PreferenceRecord) -> RenderedPair:
        """Returns the pair with the assistant header in the response, as the paper's code renders it.

        Special-token text in a record becomes special tokens, and an empty system turn precedes the prompt
        where the template speaks of system turns: both are what the published runs did.
        Source: princeton-nlp/SimPO, scripts/run_simpo.py, apply_chat_template for task simpo.

        Raises: BadRecord when the template refuses the conversation or leaves out text of it.
        """
        assert self._template is not None and self._marked is not None, "chat_template_of refuses princeton without one"
        prompt, responses, findings = self._texts(record)
        assert all(len(turns) == 1 for turns in responses), "PairOptions refuses several turns in princeton mode"
        messages, source = list(prompt), self._template.default
        if messages[0]["role"] != "system" and ("system" in source or "<|im_start|>" in source):
            messages.insert(0, {"role": "system", "content": ""})
        rendered = self._template.render(messages, record.tools)
        findings |= self._marked.check(rendered, messages, record.tools)
        texts = [self._template.render(turns).removeprefix(self._bos) for turns in responses]
        for name, text, turns in zip(("chosen", "rejected"), texts, responses, strict=True):
            found = check_turn(text, 0, turns[-1])[1]
            if "reasoning_left_out" in found:
                raise reasoning_left_out(name)
            findings |= found
        return RenderedPair(rendered, texts[0], texts[1], tuple(sorted(findings)))

    def _texts(self, record: PreferenceRecord) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...], set[str]]:
        """Returns the turns of the prompt and of both responses, and the findings of their texts."""
        prompt = as_messages(record.prompt)
        responses = tuple(as_messages(response, "assistant") for response in (record.chosen, record.rejected))
        findings = set(findings_of_texts(record, prompt, responses))
        texts = [turn["content"] for turn in (*prompt, *responses[0], *responses[1])]
        if any(map(self._specials.search, texts)):
            findings.add("special_token_text")
        elif any(map(has_template_marks, texts)):
            findings.add("template_marks")
        return prompt, responses, findings

    def _plain(self, record: PreferenceRecord, findings: set[str]) -> RenderedPair:
        turns = () if isinstance(record.prompt, str) else record.prompt
        chosen, rejected = record.chosen, record.rejected
        if not (isinstance(chosen, str) and isinstance(rejected, str)) or record.tools or any(map(says_more, turns)):
            raise BadRecord(
                "needs_template",
                "tools, calls, reasoning and responses of several turns have no form without a chat template",
            )
        notes = tuple(sorted(findings))
        if isinstance(record.prompt, str):
            return RenderedPair(record.prompt, chosen, rejected, notes)
        speakers = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}
        texts = [f"\n\n{speakers[turn['role']]}: {turn['content']}" for turn in record.prompt]
        return RenderedPair("".join(texts) + "\n\nAssistant:", " " + chosen, " " + rejected, notes)

    def _end_of_prompt(self, chosen: Conversation, rejected: Conversation, both_answer: bool) -> int:
        """Returns where the prompt ends that two conversations share.

        If both continue with a turn of the assistant, it ends where the first of these begins. A reasoning that the
        template opens belongs to it only if both responses continue it. Otherwise it ends at the last special token
        that they share, which no tokenizer merges with what follows.
        """
        assert self._marked is not None, "what has no template is concatenated"
        start = min(chosen.spans[0][0], rejected.spans[0][0])
        if not both_answer:
            special = self._marked.last_special(chosen.text, min(start, num_shared(chosen.text, rejected.text)))
            if special is None:
                raise mismatch("the template writes no special token in front of the turn at which two responses part")
            return special
        if chosen.text[:start] != rejected.text[:start]:
            raise mismatch("the template writes the prompt of one response otherwise than that of the other")
        return start


def _trained(spans: Spans, turns: Sequence[Message]) -> Spans:
    """Returns those of the assistant's spans that are trained on."""
    written = [turn for turn in turns if turn["role"] == "assistant"]
    return tuple(span for span, turn in zip(spans, written, strict=True) if not isinstance(turn, UntrainedTurn))


def _attempted(render: Callable[..., Result], *arguments: Any) -> Result | BadRecord:
    try:
        return render(*arguments)
    except BadRecord as error:
        return error
