"""Mutated records: each is used whole, dropped under a reason or counted, and nothing of it changes without a word.

SIMPO_NUM_MUTATIONS says how many are tried, 100,000 in the widest check.
"""

import json
import os
import random
import re

from chat_templates import SHAPES, with_tools
from conversations import rows
from mutated_records import mutate, mutated_row
from test_data_rendering import WIDE, templated

from simpo_megatron.data import PairOptions, build_preference_dataset
from simpo_megatron.data.records import UntrainedTurn, parse_json, to_record
from simpo_megatron.data.rendering import FINDINGS

NUM_MUTATIONS = int(os.environ.get("SIMPO_NUM_MUTATIONS", "1500"))
OPTIONS = PairOptions(responses="assistant", bad_record="skip", max_bad_fraction=1, **WIDE)
# Texts that say how a row is to be read, or that templates need not write.
NOT_WORDS = {"role", "from", "type", "id", "tool_call_id", "name", "rank", "label"}
THINKS = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"


def mutated_lines(count):
    """`count` lines of a file: rows of every form and of conversations, mutated, and now and then their bytes."""
    numbers, conversations = random.Random(11), rows(count, seed=11)
    for _ in range(count):
        row = mutated_row(numbers) if numbers.random() < 0.5 else mutate(next(conversations), numbers)
        line = json.dumps(row, ensure_ascii=numbers.random() < 0.5).encode("utf-8", "surrogatepass")
        for _ in range(numbers.choice((0, 0, 0, 0, 1, 3))):
            place = numbers.randrange(len(line) + 1)
            junk = bytes(numbers.choices(b'"\\{}[],:\x00\xff\xc3 \t0azu', k=numbers.randrange(3)))
            line = line[:place] + junk + line[place + numbers.randrange(3) :]
        yield line.replace(b"\n", b" ")


def words_of(value, key=""):
    """The texts of a row's value that a model can have learned from; arguments of calls may be JSON in a string."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from words_of(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from words_of(item, key)
    elif isinstance(value, str) and key not in NOT_WORDS:
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        if isinstance(parsed, (dict, list)):
            yield from words_of(parsed)
        elif value.strip():
            yield value.strip()


def forms_of(text):
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def check_used(line, texts):
    """Every text of the row is in its tokens, or the row's reading names where it stood."""
    row = parse_json(line)
    record = to_record(row, OPTIONS)
    unread = record.reading.unread
    if any(" key " in name for name in unread) or "more_than_two_completions" in record.reading.notes:
        return
    if any(isinstance(turn, UntrainedTurn) for response in (record.chosen, record.rejected) for turn in response):
        return  # what stands behind the last turn that counts is left out
    rendered = " ".join(texts)
    for column, value in row.items():
        if column in unread or not isinstance(value, (str, list, dict)):
            continue
        for word in words_of(value, column):
            for part in re.split(r"(?:^|\n\n)(?:Human|Assistant):", word):
                is_there = any(form in rendered for form in forms_of(part.strip()))
                assert is_there, f"{column}: {word!r} of {line.decode()}: {texts}"


def test_a_mutated_record_is_used_whole_or_has_its_reason(tmp_path):
    lines = list(mutated_lines(NUM_MUTATIONS))
    path = tmp_path / "mutated.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    tokenizer = templated(with_tools(SHAPES["plain"].replace("{{ m.content }}", THINKS)))
    dataset = build_preference_dataset([str(path)], tokenizer, OPTIONS, tmp_path / "cache", num_workers=1)
    report = dataset.report
    assert report.num_lines == NUM_MUTATIONS == report.num_used + report.dropped.total()
    assert len(dataset) == report.num_used
    print(f"{report.num_used} of {report.num_lines} used; {dict(report.dropped.most_common())}")
    assert all(reason in report.first for reason in report.dropped) and set(report.notes) <= {*FINDINGS, MORE}
    for index in range(len(dataset)):
        pair = dataset[index]
        texts = [
            tokenizer.decode([*pair.prompt_ids, *ids], clean_up_tokenization_spaces=False)
            for ids in (pair.chosen_ids, pair.rejected_ids)
        ]
        check_used(lines[dataset.where(index)[1] - 1], texts)
    assert 0.2 < report.num_used / NUM_MUTATIONS < 0.9, "some of both"


MORE = "more_than_two_completions"
