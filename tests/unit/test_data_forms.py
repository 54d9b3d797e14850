"""Rows of other people's forms: each is the pair it means, is refused by name, or says what of it was not read."""

import json
import math
import random

import pytest
from mutated_records import mutated_row

from simpo_megatron.data import PairOptions
from simpo_megatron.data.records import BadRecord, check_row, to_record

OPTIONS = PairOptions()
USER = {"role": "user", "content": "Which way?"}
CALL = {"type": "function", "function": {"name": "compass", "arguments": {"at": "sea"}}}
TOOL = {"type": "function", "function": {"name": "compass"}}
PLAIN = {"prompt": "Which way?", "chosen": "North.", "rejected": "Down."}


def said(text, **extra):
    return {"role": "assistant", "content": text, **extra}


def pair(prompt, chosen=None, rejected=None, **columns):
    return {"prompt": prompt, "chosen": [chosen or said("North.")], "rejected": [rejected or said("Down.")], **columns}


FORMS = {
    "NeMo-RL": {
        "context": [USER],
        "completions": [
            {"rank": 2, "completion": [said("Down.")]},
            {"rank": 0, "completion": [said("North.")]},
        ],
    },
    "HelpSteer3, the first one": {
        "context": [USER],
        "response1": "North.",
        "response2": "Down.",
        "overall_preference": -1,
    },
    "HelpSteer3, the second one": {
        "context": [USER],
        "response1": "Down.",
        "response2": "North.",
        "overall_preference": 3,
    },
    "Axolotl": {"messages": [USER], "chosen": said("North."), "rejected": said("Down.")},
    "Aligner": {"prompt": [USER], "chosen_response": "North.", "rejected_response": "Down."},
    "parts": pair(
        [{"role": "user", "content": [{"type": "text", "text": "Which "}, {"type": "text", "text": "way?"}]}]
    ),
    "a prompt that ends the conversations": PLAIN | {"conversations": [{"from": "human", "value": "Which way?"}]},
    "a role in capitals": pair([{"from": "Human", "value": "Which way?"}]),
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_becomes_the_same_pair(row):
    record = to_record(row, OPTIONS)
    assert (record.prompt, record.chosen, record.rejected) == ((USER,), "North.", "Down.")
    assert record.reading.unread == {}


def test_calls_and_reasoning_are_part_of_a_turn():
    called = said(None, tool_calls=[CALL])
    answered = {"role": "tool", "content": "N", "tool_call_id": "1", "name": "compass"}
    record = to_record(pair([USER, called, answered]), OPTIONS)
    assert record.prompt == (USER, said("", tool_calls=[CALL]), answered)
    record = to_record(pair([USER], said("So.", tool_calls=[CALL]), said("So.")), OPTIONS)
    assert (record.chosen, record.rejected) == ((said("So.", tool_calls=[CALL]),), "So.")
    for key in ("reasoning_content", "reasoning", "thinking"):
        record = to_record(pair([USER], said("So.", **{key: "It is."}), said("So.", **{key: "It was."})), OPTIONS)
        assert record.chosen == (said("So.", reasoning_content="It is."),)
    with pytest.raises(BadRecord, match="identical_pair"):
        to_record(pair([USER], said("So.", tool_calls=[CALL]), said("So. ", tool_calls=[CALL])), OPTIONS)


def test_arguments_of_a_call_in_json_become_the_object_that_templates_get():
    written = {"type": "function", "function": {"name": "compass", "arguments": json.dumps({"at": "sea"})}}
    assert to_record(pair([USER], said(None, tool_calls=[written])), OPTIONS).chosen == (said("", tool_calls=[CALL]),)
    calling = {"from": "function_call", "value": json.dumps(CALL["function"])}
    turns = [USER, calling, {"from": "observation", "value": "N"}]
    assert to_record(pair(turns), OPTIONS).prompt[1] == said("", tool_calls=[CALL["function"]])


def test_system_history_and_tools_columns_belong_to_the_prompt():
    row = PLAIN | {"system": "Be brief.", "history": [["Hi", "Hello"]], "tools": json.dumps([TOOL])}
    record = to_record(row, OPTIONS)
    earlier = [{"role": "user", "content": "Hi"}, said("Hello")]
    assert record.prompt == ({"role": "system", "content": "Be brief."}, *earlier, USER)
    assert record.tools == (TOOL,)
    assert record.reading.form == "chosen/rejected texts with an explicit prompt, history, system, tools"
    system = {"role": "system", "content": "Be brief."}
    assert to_record(pair([system, USER], system="Be brief. "), OPTIONS).prompt == (system, USER)
    assert to_record(PLAIN | {"system": "", "history": [], "tools": "[]"}, OPTIONS).prompt == "Which way?"


def test_messages_that_tables_keep_as_text_are_messages():
    row = {key: json.dumps(value) for key, value in pair([USER], said("So."), said("No.")).items() if value}
    record = to_record(row, OPTIONS)
    assert (record.prompt, record.chosen, record.rejected) == ((USER,), "So.", "No.")
    assert record.reading.form.endswith("; responses and prompt from JSON text")
    answers = {"prompt": "As JSON?", "chosen": json.dumps([USER]), "rejected": "[]"}
    assert to_record(answers, OPTIONS).chosen == json.dumps([USER])
    flights = {"prompt": "As JSON?", "chosen": '[{"from": "Rome", "to": "Oslo"}]', "rejected": '[{"from": "Rome"}]'}
    assert to_record(flights, OPTIONS).chosen == flights["chosen"]


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": json.dumps([USER])},
        {"prompt": json.dumps(USER)},
        {"conversations": json.dumps([{"from": "human", "value": "Which way?"}])},
        {"messages": json.dumps([USER]), "chosen": json.dumps(said("North.")), "rejected": json.dumps(said("Down."))},
    ],
)
def test_each_column_that_holds_messages_as_text_is_read(columns):
    row = {key: value for key, value in PLAIN.items() if key != "prompt"} | columns
    record = to_record(row, OPTIONS)
    assert (record.prompt, record.chosen, record.rejected) == ((USER,), "North.", "Down.")


def test_a_table_of_text_alone_holds_ranks_preferences_history_and_calls():
    ranked_text = {"context": json.dumps([USER]), "completions": json.dumps(ranked("1", "0")["completions"])}
    assert to_record(ranked_text, OPTIONS).chosen == "1."
    compared = {"context": json.dumps([USER]), "response1": "a", "response2": "b", "overall_preference": "-1"}
    assert to_record(compared, OPTIONS).chosen == "a"
    asked = PLAIN | {"history": json.dumps([["Hi", "Hello"]]), "system": "", "system_prompt": "Be brief."}
    roles = [(turn["role"], turn["content"]) for turn in to_record(asked, OPTIONS).prompt]
    assert roles == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Which way?")]
    call = json.dumps({"name": "compass", "arguments": json.dumps({"at": "sea"})})
    assert to_record(pair([USER], said(None, function_call=call)), OPTIONS).chosen[0]["tool_calls"] == [CALL]


@pytest.mark.parametrize("name", ["prompt", "context", "messages", "chosen"])
def test_messages_in_pythons_notation_are_refused_with_the_column(name):
    printed = "[{'content': 'Which way?', 'role': 'user'}]"
    row = {"chosen": "a", "rejected": "b", name: printed}
    if name == "chosen":
        row |= {"prompt": "Way?", "rejected": "[{'from': 'gpt', 'value': 'b'}]"}
    with pytest.raises(BadRecord, match=f"bad_type:{name}.*Python's notation, expected JSON"):
        to_record(row, OPTIONS)


@pytest.mark.parametrize("blank", ["", []])
def test_a_blank_cell_of_a_table_stands_for_no_value(blank):
    columns = {"conversations": blank, "messages": blank, "history": blank, "tools": blank}
    record = to_record(PLAIN | columns, OPTIONS)
    assert record.prompt == "Which way?" and record.reading.form.endswith("an explicit prompt")
    asked = {key: value for key, value in PLAIN.items() if key != "prompt"} | {"prompt": blank, "question": "Why?"}
    assert to_record(asked, OPTIONS).prompt == "Why?"
    with pytest.raises(BadRecord, match="empty_prompt|prompt_mismatch|bad_type:prompt"):
        to_record(PLAIN | {"prompt": blank}, OPTIONS)


def test_the_two_columns_of_alpaca_are_one_question():
    row = {"instruction": "Point", "input": "to the north", "chosen": "There.", "rejected": "No."}
    assert to_record(row, OPTIONS).prompt == "Point\nto the north"
    assert to_record(row | {"input": ""}, OPTIONS).prompt == "Point"
    assert to_record({"question": "Which way?", "chosen": "a", "rejected": "b"}, OPTIONS).prompt == "Which way?"


def ranked(*ranks):
    completions = [{"rank": rank, "completion": [said(f"{number}.")]} for number, rank in enumerate(ranks)]
    return {"context": [USER], "completions": completions}


REFUSED = {
    "system_mismatch": pair([{"role": "system", "content": "Be long."}, USER], system="Be brief."),
    "prompt_mismatch": PLAIN | {"conversations": [{"from": "human", "value": "Which day?"}]},
    "not_text:prompt": pair([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    "not_text:images": PLAIN | {"images": ["a.png"]},
    "bad_role:prompt": pair([{"role": "wizard", "content": "Which way?"}]),
    "bad_calls:chosen": pair([USER], said(None, tool_calls=[{"type": "function"}])),
    "bad_reasoning:chosen": pair([USER], said("So.", reasoning="a", thinking="b")),
    "bad_type:chosen": pair([USER], said(None)),
    "bad_type:tools": PLAIN | {"tools": "compass"},
    "bad_type:history": PLAIN | {"history": [["Hi"]]},
    "bad_type:completions": ranked(0),
    "tie": ranked(1, 1),
    "unpaired": {"messages": [USER, said("So.")], "label": True},
    "bad_character": pair([USER], said("So.", tool_calls=[{"name": "compass", "arguments": {"at": "\x00"}}])),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_read_whole_is_refused_by_name(reason):
    with pytest.raises(BadRecord) as error:
        to_record(REFUSED[reason], OPTIONS)
    assert error.value.reason == reason


def test_a_comparison_without_a_winner_is_a_tie_and_one_off_the_scale_is_refused():
    row = {"context": [USER], "response1": "a", "response2": "b", "overall_preference": 0}
    for found, reason in ((0, "tie"), (-100, "-100, expected a number from -3 to 3"), (math.nan, "a number, expected")):
        with pytest.raises(BadRecord, match=reason):
            to_record(row | {"overall_preference": found}, OPTIONS)
    for rank in (math.nan, True, None, "first"):
        with pytest.raises(BadRecord, match="bad_type:completions"):
            to_record(ranked(rank, 1, 0), OPTIONS)


def test_a_row_of_one_response_with_a_label_is_named_as_unpaired():
    for row in ({"prompt": "a", "response": "b", "label": False}, {"instruction": "a", "output": "b", "kto_tag": True}):
        with pytest.raises(BadRecord, match="unpaired"):
            to_record(row, OPTIONS)


def test_two_system_columns_that_differ_are_refused_and_one_of_two_equal_ones_is_taken():
    with pytest.raises(BadRecord, match="system and system_prompt differ"):
        to_record(PLAIN | {"system": "Be brief.", "system_prompt": "Be long."}, OPTIONS)
    record = to_record(PLAIN | {"system": "Be brief.", "system_prompt": "Be brief. "}, OPTIONS)
    assert record.prompt[0]["content"] == "Be brief." and not record.reading.unread


def test_what_is_refused_among_parts_is_named():
    for content, found in (({"degrees": 5}, "the keys degrees"), ([{"type": "text", "text": None}], "keys type, text"),
                           ([{"type": "refusal", "refusal": "No."}], "of type 'refusal'")):  # fmt: skip
        with pytest.raises(BadRecord, match=f"not_text:prompt.*{found}"):
            to_record(pair([{"role": "user", "content": content}]), OPTIONS)


def test_of_more_than_two_completions_the_best_and_the_worst_are_taken_and_that_is_noted():
    record = to_record(ranked(1, 3, 0), OPTIONS)
    assert (record.chosen, record.rejected) == ("2.", "1.")
    assert record.reading.notes == ("more_than_two_completions",)


def test_what_is_not_read_is_named_and_words_among_it_are_told_from_ids():
    row = PLAIN | {"note": "some words", "id": "a-7", "copy": "North.", "empty": None}
    assert to_record(row, OPTIONS).reading.unread == {"note": True, "id": False, "copy": False}
    record = to_record(pair([USER], said("So.", train_detail=3, remark="two words")), OPTIONS)
    assert record.reading.unread == {"message key train_detail": False, "message key remark": True}


def test_weights_of_turns_are_read_and_named_where_they_ask_for_what_is_never_done():
    asked = pair(
        [USER | {"weight": 0}, said("Hm.", loss=False), USER | {"train": True}], said("So.", weight=1, train=True)
    )
    record = to_record(asked, OPTIONS)
    assert (record.prompt, record.chosen) == ((USER, said("Hm."), USER), "So.")
    assert record.reading.unread == {"message key train": False}
    for weights in ({"weight": 0.5}, {"weight": "0"}, {"weight": 0, "train": True}):
        with pytest.raises(BadRecord, match="bad_weight:chosen"):
            to_record(pair([USER], said("So.", **weights)), OPTIONS)


SCORED = {
    "apart": ({"chosen_score": 3.5, "rejected_score": 1}, 2.5),
    "UltraFeedback": ({"score_chosen": 1.0, "score_rejected": 2.0}, -1.0),
    "margin": ({"margin": "0.5"}, 0.5),
    "distilabel": ({"rating": [2, 5]}, 3.0),
    "none": ({"score": 3}, math.nan),
}


@pytest.mark.parametrize(("columns", "gap"), SCORED.values(), ids=SCORED)
def test_scores_are_kept_and_may_choose_the_pairs(columns, gap):
    found = to_record(PLAIN | columns, OPTIONS).reading.score_gap
    assert found == gap or (math.isnan(found) and math.isnan(gap))
    options = PairOptions(min_score_gap=1.0)
    if gap >= 1:
        assert to_record(PLAIN | columns, options).chosen == "North."
    else:
        with pytest.raises(BadRecord, match="no_score_gap" if math.isnan(gap) else "small_score_gap"):
            to_record(PLAIN | columns, options)


def test_a_mutated_row_is_a_pair_or_has_its_reason_and_stays_what_it_was():
    numbers, used = random.Random(7), 0
    for _ in range(3000):
        row = mutated_row(numbers)
        before = json.dumps(row)
        try:
            record = to_record(check_row(row), OPTIONS)
        except BadRecord as error:
            assert error.reason and error.detail and "\n" not in error.detail
        else:
            assert record.chosen != record.rejected
            used += 1
        assert json.dumps(row) == before
    assert 500 < used < 2900, "some of both"
