"""Chat templates: a record becomes text, split where the response begins, in one of two modes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records import BadRecord, Message, PreferenceRecord
from simpo_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Unicode noncharacters, refused in records, so they can mark what belongs to whom in a rendered text.
TEMPLATE_MARK = "\ufdd0"
CONTENT_MARK = "\ufdd1"


@dataclass(frozen=True)
class RenderedPair:
    """A pair as text: each whole text is prompt + response; TEMPLATE_MARK precedes its special tokens."""

    prompt: str
    chosen: str
    rejected: str


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the texts of the tokenizer's special tokens, longest first."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return sorted((token.content for token in added if token.special), key=len, reverse=True)


def chat_template_of(tokenizer: PreTrainedTokenizerBase, options: PairOptions) -> str | None:
    """Returns the Jinja text that renders conversations, or None for plain concatenation.

    Raises: DataError when the file named by `chat_template` cannot be read, or princeton mode has no
    template.
    """
    if options.chat_template == "none":
        template = None
    elif options.chat_template:
        try:
            template = Path(options.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"chat_template: found {options.chat_template} ({error}), expected a readable Jinja file"
            ) from None
    else:
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template is None and options.template_mode == "princeton":
        raise DataError("template_mode: found princeton, expected a tokenizer with a chat template; set chat_template")
    return template


class PairRenderer:
    """Renders records with a chat template, or, without one, by plain concatenation.

    Plain concatenation takes a prompt that is a string as it is and puts the response right behind it; a
    conversation becomes `\\n\\nHuman: ...\\n\\nAssistant: ...`. With a template, a prompt that is a string is
    one turn of the user.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: PairOptions) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template_of(tokenizer, options)
        self._specials = re.compile("|".join(map(re.escape, special_texts(tokenizer))) or r"(?!)")

    def clean(self, record: PreferenceRecord) -> RenderedPair:
        """Returns the pair with the assistant header in the prompt and the template's end token last.

        Raises: BadRecord when a response is nothing but special tokens, or the template refuses the
        conversation.
        """
        for name in ("chosen", "rejected"):
            response = getattr(record, name)
            if isinstance(response, str) and not self._specials.sub("", response).strip():
                raise BadRecord(f"empty_{name}", f"the {name} response holds nothing but special tokens")
        if self._template is None:
            return self._plain(record)
        messages = self._as_text(as_messages(record.prompt))
        prompt = self._render(messages, record.tools, add_generation_prompt=True)
        responses = []
        for response in (record.chosen, record.rejected):
            turns = self._as_text(as_messages(response, "assistant"))
            content = turns[-1]["content"]
            whole = self._render([*messages, *turns], record.tools)
            if not whole.startswith(prompt):
                raise BadRecord(
                    "template_mismatch",
                    "the template writes a prompt differently once a response follows it; give another chat_template",
                )
            responses.append(self._until_end_token(whole[len(prompt) :], content))
        return RenderedPair(*(text.replace(CONTENT_MARK, "") for text in (prompt, *responses)))

    def princeton(self, record: PreferenceRecord) -> RenderedPair:
        """Returns the pair with the assistant header in the response, as the paper's code renders it.

        Special-token text in a record becomes special tokens, and an empty system turn precedes the prompt
        where the template speaks of system turns: both are what the published runs did.
        Source: princeton-nlp/SimPO, scripts/run_simpo.py, apply_chat_template for task simpo.
        """
        assert self._template is not None, "chat_template_of refuses princeton without one"
        messages = list(as_messages(record.prompt))
        if messages[0]["role"] != "system" and ("system" in self._template or "<|im_start|>" in self._template):
            messages.insert(0, {"role": "system", "content": ""})
        bos = self._tokenizer.bos_token or ""
        responses = (
            self._apply(list(as_messages(response, "assistant"))).removeprefix(bos)
            for response in (record.chosen, record.rejected)
        )
        return RenderedPair(self._apply(messages, record.tools), *responses)

    def _plain(self, record: PreferenceRecord) -> RenderedPair:
        turns = () if isinstance(record.prompt, str) else record.prompt
        if (
            record.tools
            or any(set(turn) - {"role", "content"} for turn in turns)
            or not (isinstance(record.chosen, str) and isinstance(record.rejected, str))
        ):
            raise BadRecord("needs_template", "tools, calls and reasoning have no form without a chat template")
        if isinstance(record.prompt, str):
            return RenderedPair(record.prompt, record.chosen, record.rejected)
        speakers = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}
        texts = [f"\n\n{speakers[turn['role']]}: {turn['content']}" for turn in record.prompt]
        return RenderedPair("".join(texts) + "\n\nAssistant:", " " + record.chosen, " " + record.rejected)

    def _as_text(self, turns: tuple[Message, ...]) -> list[Message]:
        return [{**turn, "content": self._break_specials(turn["content"])} for turn in turns]

    def _break_specials(self, text: str) -> str:
        return self._specials.sub(lambda found: found.group()[0] + CONTENT_MARK + found.group()[1:], text)

    def _render(
        self, messages: list[Message], tools: tuple[dict, ...] | None, add_generation_prompt: bool = False
    ) -> str:
        rendered = self._apply(messages, tools, add_generation_prompt)
        return self._specials.sub(lambda found: TEMPLATE_MARK + found.group(), rendered)

    def _apply(
        self, messages: list[Message], tools: tuple[dict, ...] | None = None, add_generation_prompt: bool = False
    ) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools else None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            roles = " ".join(turn["role"] for turn in messages)
            raise BadRecord("template_refused", f"turns of {roles}: {str(error).splitlines()[0]}") from None
        assert isinstance(text, str), "nothing is tokenised, one conversation is rendered"
        return text

    def _until_end_token(self, response: str, content: str) -> str:
        """Returns `response` up to and with the template's first special token after the content."""
        content = content.strip()
        start = max(response.rfind(content), 0) if content else 0
        mark = response.find(TEMPLATE_MARK, start + len(content))
        if mark < 0:
            return response
        special = self._specials.match(response, mark + 1)
        assert special is not None, "a mark stands before each special token"
        return response[: special.end()]


def as_messages(text: str | tuple[Message, ...], role: str = "user") -> tuple[Message, ...]:
    """Returns the conversation that a prompt or a response stands for; a string is one turn of `role`."""
    return ({"role": role, "content": text},) if isinstance(text, str) else text
