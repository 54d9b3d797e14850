"""Chat templates: choosing the one of a run, with its arguments and its date, and rendering with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo_megatron.data.pair_options import NO_TEMPLATE, PairOptions
from simpo_megatron.data.records import BadRecord, Message
from simpo_megatron.data.tokenizer_files import MAX_TOKENIZER_BYTES
from simpo_megatron.errors import DataError, StoppedBySignal
from simpo_megatron.limits import LimitError, limited, read_bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BUNDLED = Path(__file__).parent / "chat_templates"
PINNED_DATE = date(2024, 7, 26)
"""The day that a template which reads the clock is told; Llama 3.1's own template falls back to this day."""

# Limits of one rendering: a conversation of megabytes takes a second and a few times its size.
_CPU_SECONDS = 10.0
_MAX_BYTES = 1 << 30
_MAX_CHARACTERS = 16 << 20

# Text that a template contains, but not a name or a path.
_JINJA = re.compile(r"\{[{%]")
_CLOCK = "strftime_now"
_DIRECTIVES = "aAbBcdHIjmMpSUwWxXyYzZ"
_BEGINNINGS = ([("user", "a")], [("system", "b"), ("user", "a")], [("user", "a"), ("assistant", "b"), ("user", "c")])


class EndlessTemplateError(DataError):
    """A chat template that exceeded its limits; no other conversation is tried, since each may take as long."""


def bounds_of_templates() -> AbstractContextManager[None]:
    """The limits of one rendering; used around a loop as well, it makes those inside cost nothing."""
    return limited(cpu_seconds=_CPU_SECONDS, num_bytes=_MAX_BYTES)


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja texts with the arguments and the date of a run; `render` turns messages into text.

    `tool_use` is the text for conversations with tools, where the tokenizer has one of its own for them.
    """

    tokenizer: PreTrainedTokenizerBase
    default: str
    tool_use: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    day: date = PINNED_DATE

    def identity(self) -> str | dict[str, Any]:
        """Returns the identity of the template: its text, with arguments and date if there are any."""
        facts: dict[str, Any] = {"default": self.default}
        if self.tool_use is not None:
            facts["tool_use"] = self.tool_use
        if self.arguments:
            facts["arguments"] = dict(self.arguments)
        if self.reads_clock():
            facts["date"] = self.day.isoformat()
        return facts if len(facts) > 1 else self.default

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict] | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        """Returns the text of a conversation. Only this class runs templates.

        Raises: BadRecord when the template fails, however it does; EndlessTemplateError when it takes more time, memory
            or text than any conversation needs; DataError when it is no Jinja at all.
        """
        from jinja2 import TemplateSyntaxError

        try:
            with bounds_of_templates():
                rendered = self._apply(list(messages), tools, add_generation_prompt)
                if len(rendered) > _MAX_CHARACTERS:
                    raise LimitError("it writes too much")
        except TemplateSyntaxError as error:
            raise DataError(f"chat_template: found {error.message!r} in it, expected a Jinja template") from None
        except (LimitError, MemoryError) as error:
            raise EndlessTemplateError(
                f"chat_template: found one that does not come to an end ({error or 'it takes too much memory'}), "
                f"expected at most {_CPU_SECONDS:g} s, {_MAX_BYTES >> 20} MiB and {_MAX_CHARACTERS} characters for "
                "one conversation; give another one"
            ) from None
        except StoppedBySignal:
            raise
        except Exception as error:  # A template is a program: it may divide by zero, recurse or just raise.
            if (written := _with_written_arguments(messages)) != list(messages):
                return self.render(written, tools, add_generation_prompt=add_generation_prompt)
            roles = " ".join(turn["role"] for turn in messages)
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadRecord("template_refused", f"turns of {roles}: {said}") from None
        assert isinstance(rendered, str), "nothing is tokenised, one conversation is rendered"
        return rendered

    def render_all(
        self, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool = False
    ) -> list[str]:
        """Returns the texts of several conversations without tools, faster than `render` one by one.

        Raises: BadRecord when the template fails on one of them; EndlessTemplateError.
        """
        try:
            with bounds_of_templates():
                rendered: list[str] = self._apply(list(map(list, conversations)), None, add_generation_prompt)
                if any(len(text) > _MAX_CHARACTERS for text in rendered):
                    raise LimitError("it writes too much")
        except StoppedBySignal:
            raise
        except (LimitError, MemoryError) as error:
            raise EndlessTemplateError(str(error)) from None
        except Exception as error:  # Rendered one by one, the one that fails says why.
            raise BadRecord("template_refused", str(error)) from None
        return rendered

    def _apply(self, conversation: list, tools: Sequence[dict] | None, add_generation_prompt: bool) -> Any:
        """Returns the text of a conversation, or the texts of several."""
        text = self.default if self.tool_use is None or not tools else self.tool_use
        return self.tokenizer.apply_chat_template(
            conversation,
            tools=list(tools) if tools else None,
            chat_template=_with_pinned_clock(text, self.day),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.arguments,
        )

    def reads_clock(self) -> bool:
        """Returns whether some conversation is rendered differently on another day."""
        if all(_CLOCK not in text for text in (self.default, self.tool_use or "")):
            return False
        tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
        other = ChatTemplate(self.tokenizer, self.default, self.tool_use, self.arguments, date(1999, 12, 31))
        for turns in _BEGINNINGS:
            messages = [{"role": role, "content": content} for role, content in turns]
            for tools in (None, [tool]):
                try:
                    if self.render(messages, tools) != other.render(messages, tools):
                        return True
                except BadRecord:
                    continue
        return False


def lacks_template(tokenizer: PreTrainedTokenizerBase, options: PairOptions) -> bool:
    """Returns whether conversations are concatenated for want of a template, not because chat_template says none."""
    return not (options.chat_template or tokenizer.chat_template)


def chat_template_of(tokenizer: PreTrainedTokenizerBase, options: PairOptions) -> ChatTemplate | None:
    """Returns what renders conversations, or None for plain concatenation.

    `chat_template` is none, a name among the tokenizer's templates, one that comes with the package, a file, or the
    template itself.

    Raises: DataError when the template is not there, has no variable of a `chat_template_args`, or princeton
        mode has no template.
    """
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {"default": own} if own else {}
    if options.chat_template == NO_TEMPLATE or not (options.chat_template or named):
        if options.template_mode == "princeton":
            raise DataError(
                "template_mode: found princeton, expected a tokenizer with a chat template; set chat_template"
            )
        if options.chat_template_args:
            raise DataError("chat_template_args: found some, expected none without a chat template; leave them out")
        return None
    tool_use = None
    if options.chat_template:
        default = named.get(options.chat_template) or _read(options.chat_template)
    elif "default" in named:
        default, tool_use = named["default"], named.get("tool_use")
    else:
        raise DataError(
            f"chat_template: found no default among the tokenizer's templates, expected one of "
            f"{', '.join(sorted(named))} to be chosen; set chat_template to it"
        )
    arguments = dict(options.template_arguments)
    day = _day(arguments.pop(_CLOCK, None))
    for key in arguments:
        if not re.search(rf"\b{key}\b", default + (tool_use or "")):
            raise DataError(f"chat_template_args: found {key}, expected a variable that the chat template reads")
    return ChatTemplate(tokenizer, default, tool_use, arguments, day)


def chosen_template(tokenizer: PreTrainedTokenizerBase, options: PairOptions) -> str | None:
    """Returns the text of the template that `chat_template` chooses; None where it is the tokenizer's own, or none is.

    Without a template, prompts are in the model's format already, so that the tokenizer's own still holds.
    """
    if options.chat_template in ("", NO_TEMPLATE):
        return None
    template = chat_template_of(tokenizer, options)
    assert template is not None, "one was named"
    return template.default


def bundled_templates() -> dict[str, Path]:
    """Returns the templates that come with the package, by name."""
    return {path.stem: path for path in sorted(BUNDLED.glob("*.jinja"))}


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the texts of the tokenizer's special tokens, longest first."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return sorted((token.content for token in added if token.special), key=len, reverse=True)


def _with_written_arguments(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages with the arguments of calls as JSON text, as templates like DeepSeek's want them."""
    written = []
    for turn in messages:
        calls = [dict(call) for call in turn.get("tool_calls") or ()]
        for call in calls:
            function = call.get("function", call)
            if isinstance(function, Mapping) and isinstance(function.get("arguments"), Mapping):
                text = json.dumps(function["arguments"], ensure_ascii=False)
                call |= {"function": {**function, "arguments": text}} if "function" in call else {"arguments": text}
        written.append({**turn, "tool_calls": calls} if calls else turn)
    return written


def _read(name: str) -> str:
    if _JINJA.search(name):
        return name
    path = bundled_templates().get(name, Path(name))
    try:
        return read_bounded(path, MAX_TOKENIZER_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat_template: found {name} ({error}), expected a readable Jinja file") from None


def _day(value: object) -> date:
    if value is None:
        return PINNED_DATE
    try:
        return date.fromisoformat(str(value))
    except ValueError:
        raise DataError(
            f"chat_template_args: found {_CLOCK}={value}, expected a day such as {PINNED_DATE.isoformat()}"
        ) from None


def _with_pinned_clock(text: str, day: date) -> str:
    """Returns the template behind a macro that takes the clock's place, where it names the clock."""
    if _CLOCK not in text:
        return text
    midnight = datetime(day.year, day.month, day.day)
    values = {"%-d": str(day.day), "%-m": str(day.month)}
    values |= {f"%{letter}": midnight.strftime(f"%{letter}") for letter in _DIRECTIVES}
    written = "".join(f"|replace({code!r}, {value!r})" for code, value in values.items())
    # The newline behind a block belongs to it, so the template begins as it would alone.
    return f"{{%- macro {_CLOCK}(format) %}}{{{{ format{written} }}}}{{%- endmacro %}}\n{text}"
