"""One row of a preference file, in any of the accepted forms, read as a prompt and its two responses.

A row comes in as bytes or as a parsed object. What is no pair is refused with the name of the reason, which others
count.
"""

from simpo_megatron.data.records.forms import MORE_COMPLETIONS, READ_COLUMNS
from simpo_megatron.data.records.messages import Message, UntrainedTurn, as_messages, is_text_alone, says_more
from simpo_megatron.data.records.parsing import BadRecord, Unreadable, check_row, parse_json, parse_json_array
from simpo_megatron.data.records.preference_records import (
    CONTENT_MARK,
    ENDLESS_TEMPLATE,
    TEMPLATE_MARK,
    UNUSABLE_REASONS,
    PreferenceRecord,
    Reading,
    to_record,
)

__all__ = [
    "CONTENT_MARK",
    "ENDLESS_TEMPLATE",
    "MORE_COMPLETIONS",
    "READ_COLUMNS",
    "TEMPLATE_MARK",
    "UNUSABLE_REASONS",
    "BadRecord",
    "Message",
    "PreferenceRecord",
    "Reading",
    "Unreadable",
    "UntrainedTurn",
    "as_messages",
    "check_row",
    "is_text_alone",
    "parse_json",
    "parse_json_array",
    "says_more",
    "to_record",
]
