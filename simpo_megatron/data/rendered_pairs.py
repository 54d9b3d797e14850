"""Pairs as text: a record rendered by a chat template, split where the response begins, in one of two modes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpo_megatron.data.coverage import check_turn
from simpo_megatron.data.findings import findings_of_texts, has_template_marks
from simpo_megatron.data.messages import as_messages
from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records import BadRecord, Message, PreferenceRecord
from simpo_megatron.data.rendered_turns import (
    CONTENT_MARK,
    Conversation,
    Spans,
    TurnRenderer,
    mismatch,
    num_shared,
    reasoning_left_out,
    says_more,
)
from simpo_megatron.data.templates import chat_template_of, special_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RenderedPair:
    """A pair as text: each whole text is prompt + response; TEMPLATE_MARK precedes its special tokens."""

    prompt: str
    chosen: str
    rejected: str
    notes: tuple[str, ...] = ()
    """Names of what is to be counted, see FINDINGS."""
    spans: tuple[Spans, Spans] | None = None
    """Where the assistant's turns stand in chosen and in rejected; None: each is one turn of the assistant."""


class PairRenderer:
    """Renders records with a chat template, or, without one, by plain concatenation.

    Plain concatenation takes a prompt that is a string as it is and puts the response right behind it; a
    conversation becomes `\\n\\nHuman: ...\\n\\nAssistant: ...`. With a template, a prompt that is a string is
    one turn of the user.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: PairOptions) -> None:
        self._bos = tokenizer.bos_token or ""
        self._template = chat_template_of(tokenizer, options)
        self._turns = None if self._template is None else TurnRenderer(tokenizer, self._template)
        self._specials = re.compile("|".join(map(re.escape, special_texts(tokenizer))) or r"(?!)")

    def clean(self, record: PreferenceRecord) -> RenderedPair:
        """Returns the pair with the assistant header in the prompt and the template's end token last.

        Raises: BadRecord when a response is nothing but special tokens, the template refuses the conversation or
            leaves out text of it, or no boundary between prompt and response can be proven.
        """
        prompt, responses, findings = self._texts(record)
        for name, turns in zip(("chosen", "rejected"), responses, strict=True):
            texts = "".join(turn["content"] for turn in turns if turn["role"] == "assistant")
            if texts and not self._specials.sub("", texts).strip() and not any(map(says_more, turns)):
                raise BadRecord(f"empty_{name}", f"the {name} response holds nothing but special tokens")
        if self._turns is None:
            return self._plain(record, findings)
        messages, chosen_turns, rejected_turns, tools = map(self._turns.as_text, (prompt, *responses, record.tools))
        if len(chosen_turns) == len(rejected_turns) == 1:
            chosen, rejected = self._turns.answers(messages, [*chosen_turns, *rejected_turns], tools)
        else:
            chosen, rejected = (
                self._turns.converse(messages, turns, tools) for turns in (chosen_turns, rejected_turns)
            )
        both_answer = all(turns[0]["role"] == "assistant" for turns in responses)
        start = self._end_of_prompt(chosen, rejected, both_answer)
        marked = chosen.text[:start], chosen.text[start:], rejected.text[start:]
        prompt_text, chosen_text, rejected_text = (text.replace(CONTENT_MARK, "") for text in marked)
        notes, spans = tuple(sorted(findings | chosen.findings | rejected.findings)), None
        if len(chosen_turns) > 1 or len(rejected_turns) > 1:
            spans = chosen.spans_from(start, with_first=both_answer), rejected.spans_from(start, with_first=both_answer)
        return RenderedPair(prompt_text, chosen_text, rejected_text, notes, spans)

    def princeton(self, record: PreferenceRecord) -> RenderedPair:
        """Returns the pair with the assistant header in the response, as the paper's code renders it.

        Special-token text in a record becomes special tokens, and an empty system turn precedes the prompt
        where the template speaks of system turns: both are what the published runs did.
        Source: princeton-nlp/SimPO, scripts/run_simpo.py, apply_chat_template for task simpo.

        Raises: BadRecord when the template refuses the conversation or leaves out text of it.
        """
        assert self._template is not None and self._turns is not None, "chat_template_of refuses princeton without one"
        prompt, responses, findings = self._texts(record)
        assert all(len(turns) == 1 for turns in responses), "PairOptions refuses several turns in princeton mode"
        messages, source = list(prompt), self._template.default
        if messages[0]["role"] != "system" and ("system" in source or "<|im_start|>" in source):
            messages.insert(0, {"role": "system", "content": ""})
        rendered = self._template.render(messages, record.tools)
        findings |= self._turns.check(rendered, messages, record.tools)
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

        Where both go on with a turn of the assistant it ends where the first of these begins: a reasoning that the
        template opens is part of it only where both responses go on from it. Else it ends at the last special token
        that they share, which no tokenizer joins to what follows.
        """
        assert self._turns is not None, "what has no template is concatenated"
        start = min(chosen.spans[0][0], rejected.spans[0][0])
        if not both_answer:
            special = self._turns.last_special(chosen.text, min(start, num_shared(chosen.text, rejected.text)))
            if special is None:
                raise mismatch("the template writes no special token in front of the turn at which two responses part")
            return special
        if chosen.text[:start] != rejected.text[:start]:
            raise mismatch("the template writes the prompt of one response otherwise than that of the other")
        return start
