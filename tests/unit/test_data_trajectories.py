"""Responses of several turns: what the assistant wrote counts, what others said between its turns is context."""

import json

import numpy as np
import pytest
from chat_templates import SHAPES
from data_tokenizers import gemma_like, llama_like, qwen_like
from test_data_rendering import CALL, CALLS, TOOL, WIDE, templated

from simpo_megatron.data import BatchOptions, PairOptions, TokenizedPair, build_preference_dataset, collate
from simpo_megatron.data.inspect import inspect_dataset, show_pairs
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


@pytest.mark.parametrize(
    ("template", "turns", "reason"),
    [
        (SHAPES["cuts"], [said("<think>two</think>4"), USER, said("5")], "template_leaves_out"),
        (SHAPES["opens"], [said("<think>two</think>4"), USER, said("5")], "template_leaves_out"),
        (
            SHAPES["plain"].replace("m.content", "(m.content if loop.last else m.content | upper)"),
            [said("four"), USER, said("5")],
            "template_mismatch",
        ),
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
    dataset = build(rows, tmp_path, responses="assistant")
    encoded = PairTokenizer(templated(CALLS), EACH).encode([to_record(each, EACH) for each in rows])
    for index, expected in enumerate(encoded):
        found = dataset[index]
        for (ids, mask), (wanted, wanted_mask) in zip(found.responses, expected.pair.responses, strict=True):
            assert np.array_equal(ids, wanted) and np.array_equal(mask, wanted_mask)
        counted = [len(ids) if mask is None else mask.sum() for ids, mask in found.responses]
        assert dataset.counted[index].tolist() == counted
    assert dataset[0].chosen_mask is None and dataset[1].chosen_mask is not None
    assert dataset.max_token_id == max(int(ids.max()) for pair in map(dataset.__getitem__, (0, 1))
                                       for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))  # fmt: skip
    batch = collate([dataset[0], dataset[1]], [0, 1], BatchOptions())
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
