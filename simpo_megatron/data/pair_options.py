"""What a preference file becomes: the options of the pair builder, each with its default and its meaning."""

from dataclasses import dataclass
from typing import Literal, get_args

from simpo_megatron.errors import ConfigError

TemplateMode = Literal["clean", "princeton"]
BadRecordPolicy = Literal["error", "skip"]
LongPromptPolicy = Literal["cut", "drop"]


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """How records become token ids; every field changes the ids or the choice of pairs."""

    max_length: int = 2048
    """Most tokens of a prompt and one of its responses together."""
    max_prompt_length: int = 1800
    """Tokens to which a prompt may be cut when a pair is longer than `max_length`."""
    min_response_tokens: int = 1
    """Tokens that truncation leaves of a response, at least (or all of a shorter one)."""
    long_prompt: LongPromptPolicy = "cut"
    """`cut` keeps the end of a prompt that does not fit; `drop` drops and counts a pair whose prompt would be
    cut."""
    template_mode: TemplateMode = "clean"
    """`clean`: the assistant header belongs to the prompt. `princeton`: it belongs to the response, as in the
    paper's code."""
    chat_template: str = ""
    """A Jinja file that replaces the tokenizer's chat template; `none` for plain concatenation; empty for the
    tokenizer's own."""
    bad_record: BadRecordPolicy = "error"
    """`error` stops at the first malformed record; `skip` drops and counts malformed records by reason."""
    max_bad_fraction: float = 0.1
    """With `bad_record: skip`, the share of malformed records above which a file is refused."""
    allow_empty_prompt: bool = False
    """Whether a pair without a prompt is a pair (the tokenizer must then have a BOS token or a chat
    template)."""
    max_record_bytes: int = 4 << 20
    """Bytes of one record; a longer one is refused before it is parsed."""
    prompt_column: str = ""
    """The column that holds the prompt, when it is not called `prompt`."""
    chosen_column: str = ""
    """The column that holds the preferred response, when it is not called `chosen`."""
    rejected_column: str = ""
    """The column that holds the other response, when it is not called `rejected`."""

    def __post_init__(self) -> None:
        for key, policy in (
            ("template_mode", TemplateMode),
            ("bad_record", BadRecordPolicy),
            ("long_prompt", LongPromptPolicy),
        ):
            if getattr(self, key) not in get_args(policy):
                raise ConfigError(f"{key}: {getattr(self, key)!r} is not one of {', '.join(get_args(policy))}")
        for key in ("max_length", "max_prompt_length", "min_response_tokens", "max_record_bytes"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: {getattr(self, key)} given, at least 1 expected")
        most = self.max_length - self.min_response_tokens
        if self.max_prompt_length > most:
            raise ConfigError(
                f"max_prompt_length: found {self.max_prompt_length}, expected at most {most}: max_length "
                f"({self.max_length}) less min_response_tokens ({self.min_response_tokens})"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"max_bad_fraction: {self.max_bad_fraction} given, a share from 0 to 1 expected")
