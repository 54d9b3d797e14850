"""Responses of several turns: what the assistant wrote counts, what others said between its turns is context."""

import json

import numpy as np
import pytest
from chat_templates import SHAPES
from data_tokenizers import gemma_like, llama_like, qwen_like
from test_data_rendering import CALL, CALLS, TOOL, WIDE, templated

from simpo_megatron.data import BatchOptions, PairOptions, TokenizedPair, build_preference_dataset, collate
from simpo_megatron.data.inspection import inspect_dataset, show_pairs
from simpo_megatron.data.records import BadRecord, PreferenceRecord, to_record
from simpo_megatron.data.tokenization import PairTokenizer
from simpo_megatron.errors import ConfigError, DataError

EACH = PairOptions(responses="assistant", **WIDE)
USER = {"role": "user", "content": "2+2?"}
FOUND = {"role": "tool", "content": "4"}


def said(text):
    return {"role": "assistant", "content": text}


def row(chosen, rejected, **more):
    return {"chosen": chosen, "rejected": rejected, **more}


PARTED = row([USER, CALL, FOUND, said("It is 4.")], [USER, said("Five?"), USER, said("It is 5.")])


def test_responses_begin_where_the_conversations_part():
    record = to_record(PARTED, EACH)
    assert record.prompt == (USER,)
    assert record.chosen == (CALL, FOUND, said("It is 4."))
    assert record.rejected == (said("Five?"), USER, said("It is 5."))
    assert record.reading.form.startswith("chosen/rejected message lists, responses of several turns")
    last = to_record(row([USER, CALL, FOUND, said("Yes")], [USER, CALL, FOUND, said("No")]), EACH)
    assert (last.prompt, last.chosen, last.rejected) == ((USER, CALL, FOUND), "Yes", "No")
    stops = to_record(row([USER, said("4")], [USER, said("4"), USER, said("5")]), EACH)
    assert (stops.prompt, stops.chosen, stops.rejected) == ((USER,), "4", (said("4"), USER, said("5")))


@pytest.mark.parametrize("prompt", ["2+2?", [USER]])
def test_turns_that_go_on_from_a_prompt_beside_them_do_so(prompt):
    chosen, rejected = PARTED["chosen"][1:], PARTED["rejected"][1:]
    record = to_record(row(chosen, rejected, prompt=prompt), EACH)
    assert (record.prompt, record.chosen) == ((USER,), tuple(chosen))
    shared = to_record(row([CALL, FOUND, said("Yes")], [CALL, FOUND, said("No")], prompt=prompt), PairOptions())
    assert (shared.prompt, shared.chosen) == ((USER, CALL, FOUND), "Yes")
    other = {**FOUND, "content": "5"}
    answered = to_record(row([FOUND, said("4")], [other, said("5")], prompt=[USER, CALL]), EACH)
    assert (answered.prompt, answered.chosen) == ((USER, CALL), (FOUND, said("4")))


@pytest.mark.parametrize(
    ("columns", "options", "reason"),
    [
        (PARTED, PairOptions(), "prompt_mismatch"),
        (row([said("a")], [said("b")]), EACH, "missing_key:prompt"),
        (row([USER, said("a")], [{**USER, "content": "3+3?"}, said("b")]), EACH, "prompt_mismatch"),
        (row(PARTED["chosen"], PARTED["rejected"], prompt="3+3?"), EACH, "prompt_mismatch"),
        (row([USER, said(" "), USER, said("a")], [USER, said("b")]), EACH, "empty_chosen"),
        (row([USER, said("a"), FOUND, said("c")], [USER, said("a "), USER, said("c")]), EACH, "identical_pair"),
        (row([USER, said("a"), said("b")], [USER, said("a"), USER, said("b")]), EACH, "bad_role:prompt"),
    ],
)
def test_turns_that_are_no_pair_are_refused(columns, options, reason):
    with pytest.raises(BadRecord) as refused:
        to_record(columns, options)
    assert refused.value.reason == reason
    if options.responses == "last" and reason == "prompt_mismatch":
        assert "responses: assistant" in refused.value.detail


def test_the_papers_mode_has_responses_of_one_turn():
    with pytest.raises(ConfigError, match="responses: found 'assistant', expected last with template_mode princeton"):
        PairOptions(responses="assistant", template_mode="princeton")


def shown(tokenizer, record, **options):
    """(prompt, chosen, rejected) as text, context in brackets, and the findings."""
    settings = {"responses": "assistant"} | WIDE | options
    [result] = PairTokenizer(tokenizer, PairOptions(**settings)).encode([record])
    if isinstance(result, BadRecord):
        raise result
    texts = []
    for ids, mask in result.pair.responses:
        edges = np.flatnonzero(np.diff(np.ones(len(ids)) if mask is None else mask)) + 1
        pieces = np.split(np.arange(len(ids)), edges)
        decoded = [tokenizer.decode(ids[piece], clean_up_tokenization_spaces=False) for piece in pieces]
        counts = [mask is None or bool(mask[piece[0]]) for piece in pieces]
        texts.append("".join(text if count else f"[{text}]" for text, count in zip(decoded, counts, strict=True)))
    return tokenizer.decode(result.pair.prompt_ids), *texts, result.notes


def record_of(chosen, rejected, prompt=(USER,), **more):
    return PreferenceRecord(tuple(prompt), tuple(chosen), tuple(rejected), **more)


def test_calls_and_answers_count_and_results_do_not():
    record = record_of(PARTED["chosen"][1:], [CALL, {**FOUND, "content": "5"}, said("It is 5.")], tools=(TOOL,))
    template = "{{ tools[0].function.name }}" + CALLS
    call = '{"name": "add", "arguments": {"x": "two"}}<|im_end|>'
    between = "\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert shown(templated(template), record) == (
        "weather<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
        f"{call}[{between.format(4)}]It is 4.<|im_end|>",
        f"{call}[{between.format(5)}]It is 5.<|im_end|>",
        (),
    )


@pytest.mark.parametrize("like", [llama_like, qwen_like, gemma_like])
def test_turns_of_users_between_answers_are_context_in_every_family(like):
    record = record_of([said("Four"), {**USER, "content": "Sure?"}, said("Yes, 4.")], [said("Five")])
    tokenizer = like()
    prompt, chosen, rejected, _ = shown(tokenizer, record)
    end = {"gemma": "<end_of_turn>", "llama": "<|eot_id|>", "qwen": "<|im_end|>"}[like.__name__.split("_")[0]]
    asked = tokenizer.apply_chat_template([USER, said("Four"), {**USER, "content": "Sure?"}], tokenize=False,
                                          add_generation_prompt=True)  # fmt: skip
    assert rejected == "Five" + end
    assert chosen == f"Four{end}[{asked.removeprefix(f'{prompt}Four{end}')}]Yes, 4.{end}"


def test_results_that_differ_are_where_the_responses_begin():
    prompt, chosen, rejected, _ = shown(
        templated(CALLS), record_of([FOUND, said("4!")], [{**FOUND, "content": "5"}, said("5!")], (USER, CALL))
    )
    assert prompt.endswith('"two"}}<|im_end|>\n<|im_start|>')
    assert chosen == "[tool\n4<|im_end|>\n<|im_start|>assistant\n]4!<|im_end|>"
    assert rejected == "[tool\n5<|im_end|>\n<|im_start|>assistant\n]5!<|im_end|>"


def test_an_empty_reasoning_in_front_of_the_last_turn_alone_is_no_part_of_the_others():
    turns = [CALL, FOUND, said("It is 4.")]
    template = CALLS.replace(
        "{% for c in", "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{% for c in"
    )
    found = shown(templated(template), record_of(turns, [said("five"), USER, said("5")]))
    assert found[1].startswith('{"name": "add", "arguments": {"x": "two"}}<|im_end|>[\n<|im_start|>tool\n4<|im_end|>')
    assert found[1].endswith("assistant\n]<think>\n\n</think>\n\nIt is 4.<|im_end|>")
    assert found[2].startswith("five<|im_end|>[\n<|im_start|>user")
    assert found[3] == ("empty_reasoning",)


def test_a_call_may_end_in_several_special_tokens():
    ended = CALLS.replace("{% endfor %}{{ m.content }}", "<|endoftext|>{% endfor %}{{ m.content }}")
    found = shown(templated(ended), record_of([CALL, FOUND, said("4")], [CALL]))
    call = '{"name": "add", "arguments": {"x": "two"}}<|endoftext|><|im_end|>'
    assert found[1].startswith(call + "[\n<|im_start|>tool") and found[2] == call
    twice = CALLS.replace("{% endif %}", "{% else %}<|endoftext|>{% endif %}")
    assert (
        shown(templated(twice), record_of([CALL], [said("4")]))[1]
        == '{"name": "add", "arguments": {"x": "two"}}<|im_end|>'
    )


# As gpt-oss's template: what led to a call is written until the call has its answer.
UNTIL_ANSWERED = (
    "{% set found = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}"
    "{% set found.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% set thought = m.reasoning_content or (m.content if m.tool_calls else '') %}{% if thought and "
    "(loop.index0 > found.last if m.tool_calls else loop.last) %}<|im_start|>assistant analysis: {{ thought }}"
    "<|im_end|>{% endif %}{% if m.tool_calls %}<|im_start|>assistant calls "
    "{{ m.tool_calls[0].function | tojson }}<|im_end|>"
    "{% else %}<|im_start|>{{ m.role }}{{ ' final' if m.role == 'assistant' }}: {{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


@pytest.mark.parametrize("thought", [{"reasoning_content": "I look"}, {"content": "I look"}])
def test_an_answer_goes_on_from_the_prompt_that_asks_for_it_where_the_template_then_drops_what_led_to_the_call(thought):
    call, answer = CALL | thought, said("It is 4.") | {"reasoning_content": "it says 4"}
    tokenizer = templated(UNTIL_ANSWERED)
    whole = ' calls {"name": "add", "arguments": {"x": "two"}}<|im_end|>'
    between = "<|im_start|>tool: 4<|im_end|><|im_start|>assistant"
    prompt, chosen, _, notes = shown(tokenizer, record_of([call, FOUND, answer], [CALL]))
    assert chosen == (
        f" analysis: I look<|im_end|><|im_start|>assistant{whole}[{between}]"
        " analysis: it says 4<|im_end|><|im_start|>assistant final: It is 4.<|im_end|>"
    )
    assert notes == ("earlier_reasoning_kept", "reasoning_on_one_side")
    asked = record_of([answer], [said("5")], (USER, call, FOUND))
    assert shown(tokenizer, asked)[0] == f"{prompt} analysis: I look<|im_end|><|im_start|>assistant{whole}{between}"
    later = record_of([call, FOUND, said("4"), USER, said("four")], [CALL])
    with pytest.raises(BadRecord, match="template_leaves_out|template_mismatch"):
        shown(tokenizer, later)
    gladly = "{% if messages[1].reasoning_content or messages[1].content %} gladly{% endif %}"
    other = UNTIL_ANSWERED.replace("%}<|im_start|>assistant{% endif", "%}<|im_start|>assistant" + gladly + "{% endif")
    with pytest.raises(BadRecord, match="template_mismatch"):
        shown(templated(other), asked)


# As DeepSeek V3's: a prompt opens a reasoning that calls never have, and results are followed by no header.
OPENS_BEFORE_CALLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}<tool>{{ m.content }}</tool>{% elif m.role == 'user' %}"
    "<|im_start|>user: {{ m.content }}{% else %}{% if loop.previtem.role != 'tool' %}<|im_start|>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<|endoftext|>call {{ c.function | tojson }}{% endfor %}<|im_end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1].role != 'tool' %}<|im_start|><think>\n"
    "{% endif %}"
)


def test_a_call_without_a_text_begins_where_its_text_would():
    tokenizer = templated(OPENS_BEFORE_CALLS)
    call = '<|endoftext|>call {"name": "add", "arguments": {"x": "two"}}<|im_end|>'
    for text in ("", "I look"):
        found = shown(tokenizer, record_of([CALL | {"content": text}, FOUND, said("It is 4.")], [said("5")]))
        assert found == (
            "<|im_start|>user: 2+2?<|im_start|>",
            f"{text}{call}[<tool>4</tool>]It is 4.<|im_end|>",
            "5<|im_end|>",
            ("opened_reasoning_left_out",),
        )
        assert shown(tokenizer, record_of([CALL | {"content": text}], [said("5")]))[1] == text + call
    moved = OPENS_BEFORE_CALLS.replace("{{ m.content }}{% for c", "{{ m.content }}{{ m.content | length }}{% for c")
    with pytest.raises(BadRecord, match="template_mismatch"):
        shown(templated(moved), record_of([CALL], [said("5")]))


@pytest.mark.parametrize(
    ("template", "turns", "reason"),
    [
        (SHAPES["cuts"], [said("<think>two</think>4"), USER, said("5")], "template_leaves_out"),
        (SHAPES["opens"], [said("<think>two</think>4"), USER, said("5")], "template_leaves_out"),
        (SHAPES["plain"].replace("<|im_end|>", ""), [said("4"), USER, said("5")], "template_mismatch"),
        (SHAPES["plain"], [CALL, FOUND, said("5")], "template_leaves_out"),
        ("none", [said("4"), USER, said("5")], "needs_template"),
    ],
)
def test_a_boundary_that_no_rendering_shows_refuses_the_pair(template, turns, reason):
    options = {"chat_template": "none"} if template == "none" else {}
    with pytest.raises(BadRecord) as refused:
        shown(templated(template), record_of(turns, [said("no")]), **options)
    assert refused.value.reason == reason


def test_a_turn_that_is_rewritten_once_another_follows_ends_where_its_content_does_and_is_counted():
    template = SHAPES["plain"].replace("m.content", "(m.content if loop.last else m.content | upper)")
    chosen, notes = shown(templated(template), record_of([said("four"), USER, said("5")], [said("no")]))[1::2]
    assert chosen.startswith("FOUR<|im_end|>[") and chosen.endswith("5<|im_end|>") and "text_rewritten" in notes


def weighted(turn, **weights):
    return {**turn, **weights}


@pytest.mark.parametrize("weight", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_a_turn_of_no_weight_is_context(weight):
    turns = [said("Four"), USER, said("4"), USER, said("four")]
    between = "[{}\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n]"
    for number, expected in (
        (0, "[Four<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n]4<|im_end|>{0}four<|im_end|>"),
        (2, "Four<|im_end|>[\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>{1}four<|im_end|>"),
        (4, "Four<|im_end|>{0}4<|im_end|>"),
    ):
        chosen = [weighted(turn, **weight) if index == number else turn for index, turn in enumerate(turns)]
        record = to_record(row([USER, *chosen], [USER, said("Five")]), EACH)
        found = shown(templated(SHAPES["plain"]), record)
        assert found[1] == expected.format(between.format(""), between.format("")[1:])
        assert found[2:] == ("Five<|im_end|>", ("untrained_turns",))


def test_a_turn_of_no_weight_in_the_prompt_changes_nothing(tmp_path):
    prompt = [USER, said("Four"), USER]
    rows = [row([*prompt, said("Yes")], [*prompt, said("No")])]
    rows += [row([USER, weighted(said("Four"), weight=0), USER, said("Yes")], rows[0]["rejected"])]
    for options in ({}, {"responses": "assistant"}):
        dataset = build(rows, tmp_path, **options)
        one, two = (dataset[index].marked() for index in (0, 1))
        assert all(map(np.array_equal, one, two)) and len(set(dataset.prompt_keys)) == 1
        assert "untrained_turns" not in dataset.report.notes


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (PairOptions(), [said("Four"), USER, weighted(said("4"), weight=0)]),
        (PairOptions(), [weighted(said("4"), train=False)]),
        (EACH, [weighted(said("Four"), weight=0), USER, weighted(said("4"), loss=False)]),
        (EACH, [weighted(said("4"), weight=0)]),
    ],
)
def test_a_response_without_a_turn_that_counts_is_refused(options, chosen):
    rejected = [USER, said("5")]
    for columns, name in ((row([USER, *chosen], rejected), "chosen"), (row(rejected, [USER, *chosen]), "rejected")):
        with pytest.raises(BadRecord, match=f"untrained:{name}"):
            to_record(columns, options)


def test_a_token_across_an_edge_is_tokenised_apart():
    # Without a special token or a line in front of them, the blank and the answer would be one token.
    joined = SHAPES["plain"].replace("assistant\n", "assistant ").replace("{{ m.role }}\n", "{{ m.role }} ")
    record = record_of([said("the answer"), USER, said("the answer")], [said("the people")])
    _, chosen, rejected, notes = shown(templated(joined), record)
    assert notes == ("tokenized_apart",)
    assert (
        chosen == "the answer<|im_end|>[\n<|im_start|>user 2+2?<|im_end|>\n<|im_start|>assistant ]the answer<|im_end|>"
    )
    assert rejected == "the people<|im_end|>"


def test_a_response_is_cut_behind_its_last_counted_token():
    record = record_of([said("Four"), {**USER, "content": "Sure? " * 40}, said("Yes")], [said("Five")])
    found = shown(templated(SHAPES["plain"]), record, max_length=60, max_prompt_length=30)
    assert found[1] == "Four<|im_end|>"
    record = record_of([{**FOUND, "content": "4 " * 60}, said("Yes")], [FOUND, said("Five")], (USER, CALL))
    with pytest.raises(BadRecord, match="cut_before_answer"):
        shown(templated(CALLS), record, max_length=60, max_prompt_length=10)


def build(rows, tmp_path, **options):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    tokenizer = templated(CALLS)
    return build_preference_dataset([str(path)], tokenizer, PairOptions(**options), tmp_path / "cache")


def test_the_store_keeps_what_counts(tmp_path):
    rows = [row([USER, said("Yes")], [USER, said("No")]), PARTED]
    turns = PARTED["rejected"]
    rows.append(row(PARTED["chosen"], [USER, weighted(turns[1], weight=0), *turns[2:]]))
    dataset = build(rows, tmp_path, responses="assistant")
    encoded = PairTokenizer(templated(CALLS), EACH).encode([to_record(each, EACH) for each in rows])
    for index, expected in enumerate(encoded):
        found = dataset[index]
        for (ids, mask), (wanted, wanted_mask) in zip(found.responses, expected.pair.responses, strict=True):
            assert np.array_equal(ids, wanted) and np.array_equal(mask, wanted_mask)
        counted = [len(ids) if mask is None else mask.sum() for ids, mask in found.responses]
        assert dataset.counted[index].tolist() == counted
    assert dataset[0].chosen_mask is None and dataset[1].chosen_mask is not None
    assert dataset.counted[2, 1] == dataset.counted[1, 1] - np.argmin(dataset[1].rejected_mask) > 0
    assert dataset.max_token_id == max(int(ids.max()) for pair in map(dataset.__getitem__, (0, 1, 2))
                                       for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))  # fmt: skip
    batch = collate([dataset[index] for index in range(3)], [0, 1, 2], BatchOptions())
    assert len(batch.targets_N) == dataset.counted.sum()
    with pytest.raises(DataError, match=r"pairs.jsonl:2: prompt_mismatch: .* responses: assistant"):
        build(rows, tmp_path)


def test_context_is_shown_as_such(tmp_path):
    dataset = build([PARTED], tmp_path, responses="assistant")
    [pair] = show_pairs(dataset, templated(CALLS), 1)
    assert [name for name, _ in pair.pieces] == [
        "prompt",
        "chosen",
        "context",
        "chosen",
        "rejected",
        "context",
        "rejected",
    ]
    assert dict(pair.pieces)["context"].endswith("2+2?<|im_end|>\n<|im_start|>assistant\n")
    [pair] = show_pairs(build([dict(PARTED, rejected=[*PARTED["rejected"][:3], weighted(said("5"), weight=0)])],
                              tmp_path, responses="assistant"), templated(CALLS), 1)  # fmt: skip
    assert [name for name, _ in pair.pieces] == ["prompt", "chosen", "context", "chosen", "rejected"]
    assert pair.pieces[-1] == ("rejected", "Five?<|im_end|>")
    rows = {found.name: found.value for found in inspect_dataset(dataset, templated(CALLS)).sections["Work saved"]}
    assert rows["tokens of context in responses"] == str(dataset.lengths[0, 1:].sum() - dataset.counted.sum())


def test_marks_come_back_as_masks():
    ids = np.array([5, 0, 7], np.int32)
    pair = TokenizedPair(ids, ids, ids, np.array([False, False, True]))
    prompt, chosen, rejected = pair.marked()
    assert chosen.tolist() == [-6, -1, 7] and chosen.dtype == np.int32
    again = TokenizedPair.from_marked(prompt, chosen, rejected)
    assert np.array_equal(again.chosen_ids, ids) and again.chosen_mask.tolist() == [False, False, True]
    assert again.rejected_mask is None
