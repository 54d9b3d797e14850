"""Options of the pair builder, each with its default and its meaning."""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from simpo_megatron.errors import require, require_positive
from simpo_megatron.option_field import option

TemplateMode = Literal["clean", "princeton"]
BadRecordPolicy = Literal["error", "skip"]
LongPromptPolicy = Literal["cut", "drop"]
TrainedResponses = Literal["last", "assistant"]
# A value of chat_template: texts are already in the model's format, with its special tokens.
NO_TEMPLATE = "none"
# Variables that every rendering sets, and parameters of the function that renders.
_NOT_ARGUMENTS: tuple[str, ...] = (
    "messages",
    "tools",
    "add_generation_prompt",
    "conversation",
    "chat_template",
    "tokenize",
)
_NOT_ARGUMENTS += ("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict")
_NOT_ARGUMENTS += ("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens")


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Tokenization of preference records; every option changes the token ids or the choice of pairs."""

    max_length: int = option(2048, "Most tokens of a prompt with one response.", everyday=True)
    max_prompt_length: int = option(
        1800, "Tokens to which a prompt may be truncated when a pair is longer than max_length."
    )
    min_response_tokens: int = option(
        1, "Fewest tokens that truncation leaves of a response (or all of a shorter one)."
    )
    long_prompt: LongPromptPolicy = option(
        "cut",
        "What to do with a prompt that does not fit: cut keeps its end, drop drops and counts the pair.",
    )
    responses: TrainedResponses = option(
        "last",
        "Turns that are trained on: last is the final turn, before which both responses must agree; assistant is each "
        "turn of the assistant from where they part, tool results and user turns between them being context. last is "
        "the default: pairs that part earlier are more often damaged than meant, and the papers trained on one turn.",
    )
    template_mode: TemplateMode = option(
        "clean",
        "Side of the assistant header: clean puts it into the prompt, princeton into the response as the paper's "
        "code does.",
    )
    chat_template: str = option(
        "",
        "Jinja file that replaces the tokenizer's chat template; empty for the tokenizer's own. Also the name of one "
        "of the tokenizer's templates, or of one that comes with the package: simpo-gemma2, simpo-mistral. Text with "
        "{{ or {% is the template itself. none is for texts in the model's format, which are joined as they are, "
        "special tokens in them included.",
        metavar="FILE",
    )
    chat_template_args: tuple[str, ...] = option(
        (),
        "Variables of the chat template, such as enable_thinking=false. Values are JSON, or else text; "
        "strftime_now=2025-01-31 is the day that a template which asks for the date is told.",
        metavar="KEY=VALUE",
    )
    bad_record: BadRecordPolicy = option(
        "error", "Malformed records: error stops at the first one, skip drops and counts them by reason."
    )
    max_bad_fraction: float = option(
        0.1, "With bad_record skip, the fraction of malformed records above which a file is refused."
    )
    allow_empty_prompt: bool = option(
        False, "Accept pairs without a prompt (the tokenizer then needs a BOS token or a chat template)."
    )
    max_record_bytes: int = option(4 << 20, "Most bytes of one record; a longer one is refused before it is parsed.")
    prompt_column: str = option("", "Column of the prompt, when it is not called prompt.", metavar="NAME")
    chosen_column: str = option("", "Column of the preferred response, when it is not called chosen.", metavar="NAME")
    rejected_column: str = option("", "Column of the other response, when it is not called rejected.", metavar="NAME")

    min_score_gap: float | None = option(
        None,
        "Drop pairs whose responses were scored less than this apart, or not at all (chosen_score and "
        "rejected_score, margin, rating, overall_preference).",
    )

    def __post_init__(self) -> None:
        for key, policy in (
            ("responses", TrainedResponses),
            ("template_mode", TemplateMode),
            ("bad_record", BadRecordPolicy),
            ("long_prompt", LongPromptPolicy),
        ):
            found, allowed = getattr(self, key), get_args(policy)
            require(found in allowed, key, found, " or ".join(allowed))
        require(
            self.responses == "last" or self.template_mode == "clean",
            "responses",
            self.responses,
            "last with template_mode princeton, whose responses are one turn",
        )
        require_positive(self, "max_length", "max_prompt_length", "min_response_tokens", "max_record_bytes")
        most = self.max_length - self.min_response_tokens
        require(
            self.max_prompt_length <= most,
            "max_prompt_length",
            self.max_prompt_length,
            f"at most {most}: max_length ({self.max_length}) less min_response_tokens ({self.min_response_tokens})",
        )
        require(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", self.max_bad_fraction, "a fraction from 0 to 1")
        for item in self.chat_template_args:
            match = re.fullmatch(r"([A-Za-z]\w*)=.*", item, re.DOTALL)
            is_argument = match is not None and match[1] not in _NOT_ARGUMENTS
            require(is_argument, "chat_template_args", item, "KEY=VALUE with a variable that is the template's own")
        keys = [item.split("=")[0] for item in self.chat_template_args]
        require(len(set(keys)) == len(keys), "chat_template_args", " ".join(keys), "each variable once")

    @property
    def template_arguments(self) -> dict[str, Any]:
        """`chat_template_args` as a template gets them: values from JSON, words of Python or text."""
        pairs = (item.split("=", 1) for item in self.chat_template_args)
        return {key: _value(text) for key, text in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text), parse_constant=str)
    except (ValueError, RecursionError):
        return text
