"""Findings: oddities of a pair that are counted, not refused; and the function that finds those in its text."""

from __future__ import annotations

import re

from simpo_megatron.data.records import Message, PreferenceRecord, UntrainedTurn

FINDINGS = {
    "tokenized_apart": "a token would reach across the boundary, so prompt and response are tokenised apart",
    "text_changed_by_tokenizer": "the tokens decode to another text than was rendered",
    "blanks_left_out": "the template leaves out blanks around a turn",
    "text_rewritten": "the template writes a turn with other blanks or capitals",
    "history_reasoning_left_out": "the template leaves out the reasoning of earlier turns, as it does in a chat",
    "earlier_reasoning_kept": "the template drops what led to a call once it is answered; the answer is trained on "
    "behind the prompt that asks for it, which has it",
    "reasoning_put_back": "the template leaves out the reasoning of a response; it is trained on as the file has it",
    "opened_reasoning_left_out": "the template opens a reasoning for the model, and the response has none",
    "empty_reasoning": "the template puts an empty reasoning block in front of a response",
    "special_token_text": "a text holds special tokens as text: it may have been through a chat template already",
    "template_marks": "a text holds marks of another model's chat template, which stay in it as text",
    "repeats_prompt": "responses repeat the prompt: they begin with its text",
    "dialogue_in_response": "responses begin with, or hold, a whole dialogue",
    "empty_reasoning_in_text": "a response begins with an empty reasoning block of its own",
    "reasoning_on_one_side": "only one of the two responses has a reasoning",
    "untrained_turns": "turns with weight 0, train false or loss false count neither in |y| nor in the loss",
    "tools_not_called": "tools are offered, and no turn calls one",
}
"""Meaning of each count of a pair, by the name of the reason."""

HARMLESS = frozenset({"blanks_left_out", "history_reasoning_left_out", "earlier_reasoning_kept", "untrained_turns"})
"""Findings that templates make of good data, so that they are counted without a warning."""

EMPTY_REASONING = re.compile(r"<think>\s*</think>")
_DIALOGUE = re.compile(r"\n\n(Human|Assistant):")
# Speakers at the beginning of lines, as in transcripts and in Vicuna's form.
_ASKED = re.compile(r"^\W*(human|user|question)\W*:", re.IGNORECASE | re.MULTILINE)
_ANSWERED = re.compile(r"^\W*(assistant|ai|bot|gpt|answer)\W*:", re.IGNORECASE | re.MULTILINE)
# Of ChatML, Llama 3, Llama 2 and Mistral, Gemma, Zephyr and Phi, DeepSeek, gpt-oss, Alpaca.
_TEMPLATE_MARKS = re.compile(
    r"<\|im_(start|end)\|>|<\|(start|end)_header_id\|>|<\|eot_id\|>|\[/?INST\]|<</?SYS>>|<(start|end)_of_turn>"
    r"|<\|(user|assistant|system|end|channel)\|>|<\uff5c(User|Assistant)\uff5c>|^### (Instruction|Response):",
    re.MULTILINE,
)
# Shorter prompts, such as Hi, begin answers by chance.
_MIN_REPEATED = 8


def split_reasoning(content: str) -> tuple[str, str]:
    """Returns (reasoning, answer) of a text with <think> or </think> in it, without blanks around; else ("", text)."""
    before, mark, answer = content.rpartition("</think>")
    if not mark:
        return "", content.strip()
    reasoning = before.partition("<think>")[2] or before
    return reasoning.strip(), answer.strip()


def findings_of_texts(
    record: PreferenceRecord, prompt: tuple[Message, ...], responses: tuple[tuple[Message, ...], ...]
) -> list[str]:
    """Returns the names of the findings in a record's own text, before the template."""
    found = []
    last = next((turn["content"].strip() for turn in reversed(prompt) if turn["role"] == "user"), "")
    written = [[turn for turn in turns if turn["role"] == "assistant"] for turns in responses]
    texts = [turn["content"] for turns in written for turn in turns]
    if len(last) >= _MIN_REPEATED and any(text.lstrip().startswith(last) for text in texts):
        found.append("repeats_prompt")
    # Each of these patterns needs a colon, which few texts have.
    spoken = [text for text in texts if ":" in text]
    if any(_DIALOGUE.search(text) or (_ASKED.search(text) and _ANSWERED.search(text)) for text in spoken):
        found.append("dialogue_in_response")
    if any(EMPTY_REASONING.match(text.lstrip()) for text in texts):
        found.append("empty_reasoning_in_text")
    if len({any(map(_has_reasoning, turns)) for turns in written}) > 1:
        found.append("reasoning_on_one_side")
    turns = [*prompt, *(turn for response in responses for turn in response)]
    if any(isinstance(turn, UntrainedTurn) for response in responses for turn in response):
        found.append("untrained_turns")
    if record.tools and not any(turn.get("tool_calls") for turn in turns):
        found.append("tools_not_called")
    return found


def has_template_marks(text: str) -> bool:
    """Returns whether a text holds the marks that some model's chat template writes around turns."""
    # Most texts hold none of the letters that marks begin with, which is quicker to see.
    return ("<" in text or "[" in text or "#" in text) and _TEMPLATE_MARKS.search(text) is not None


def _has_reasoning(turn: Message) -> bool:
    return bool(turn.get("reasoning_content") or split_reasoning(turn["content"])[0])
