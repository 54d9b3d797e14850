"""Tokens are the template's own text with one end token, or the pair is dropped with a reason."""

import pytest
from chat_templates import SHAPES, with_tools
from conversations import rows
from data_tokenizers import gemma_like, llama_like, qwen_like
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from simpo_megatron.config.presets import PRESETS
from simpo_megatron.data import PairOptions
from simpo_megatron.data.records import BadRecord, PreferenceRecord, to_record
from simpo_megatron.data.rendering import chat_template_of
from simpo_megatron.data.rendering.findings import findings_of_texts
from simpo_megatron.data.tokenization import EncodedPair, PairTokenizer, tokenizer_identity
from simpo_megatron.errors import ConfigError, DataError

WIDE = {"max_length": 100_000, "max_prompt_length": 50_000}
THOUGHT = "<think>\ntwo and two\n</think>\n\nIt is 4."
OTHER = "<think>\nhm\n</think>\n\nIt is 5."
CLOCK = "{{ strftime_now('%d %b %Y') }}" + SHAPES["plain"]


def templated(template, like=qwen_like):
    plain = like()
    names = {"bos_token": plain.bos_token, "eos_token": plain.eos_token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, **names)
    tokenizer.chat_template = template
    return tokenizer


def encode(tokenizer, record, **options):
    """(prompt, chosen, rejected) as text, and the findings."""
    [result] = PairTokenizer(tokenizer, PairOptions(**(WIDE | options))).encode([record])
    if isinstance(result, BadRecord):
        raise result
    pair = result.pair
    ids = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    return *(tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in ids), result.notes


def asked(chosen=THOUGHT, rejected=OTHER, prompt="2+2?", **more):
    return PreferenceRecord(({"role": "user", "content": prompt},), chosen, rejected, **more)


@pytest.mark.parametrize(
    ("shape", "prompt", "chosen", "notes"),
    [
        ("plain", "<|im_start|>assistant\n", THOUGHT + "<|im_end|>", ()),
        ("thinks", "<|im_start|>assistant\n", THOUGHT + "<|im_end|>", ()),
        ("opens", "assistant\n<think>\n", THOUGHT.removeprefix("<think>\n") + "<|im_end|>", ()),
        ("strips", "<|im_start|><think>\n", THOUGHT.removeprefix("<think>\n") + "<|im_end|>", ("reasoning_put_back",)),
        ("cuts", "<|im_start|>assistant\n", THOUGHT + "<|im_end|>", ("reasoning_put_back",)),
        ("ends twice", "<|im_start|>assistant\n", THOUGHT + "<|im_end|>", ()),
    ],
)
def test_a_reasoning_is_trained_on_with_one_end_token(shape, prompt, chosen, notes):
    found = encode(templated(SHAPES[shape]), asked())
    assert found[0].endswith(prompt)
    assert found[1:] == (chosen, chosen.replace("two and two", "hm").replace("4", "5"), notes)


def test_channels_of_one_response_stay_together():
    found = encode(templated(SHAPES["channels"]), asked())
    assert found[1] == " analysis: two and two<|im_end|><|im_start|>assistant final: It is 4.<|endoftext|>"


def test_a_reasoning_that_the_template_opens_is_left_to_the_responses_where_one_has_none():
    prompt, chosen, rejected, notes = encode(templated(SHAPES["strips"]), asked(rejected="It is 5."))
    assert prompt.endswith("<|im_start|>")
    assert (chosen, rejected) == (THOUGHT + "<|im_end|>", "It is 5.<|im_end|>")
    assert notes == ("opened_reasoning_left_out", "reasoning_on_one_side", "reasoning_put_back")


def test_an_empty_reasoning_is_counted_and_an_argument_of_the_template_avoids_it():
    template = SHAPES["thinks"].replace("{% if loop.last %}", "{% if loop.last and thinking is not defined %}")
    assert encode(templated(template), asked("a", "b"))[1:] == (
        "<think>\n\n</think>\n\na<|im_end|>",
        "<think>\n\n</think>\n\nb<|im_end|>",
        ("empty_reasoning",),
    )
    found = encode(templated(template), asked("a", "b"), chat_template_args=("thinking=false",))
    assert found[1:] == ("a<|im_end|>", "b<|im_end|>", ())


def test_a_reasoning_that_is_opened_and_closed_at_once_is_counted():
    closes = SHAPES["opens"].replace("<think>\n{{ thought }}\n</think>", "<think></think>")
    prompt, chosen, rejected, notes = encode(templated(closes), asked("a", "b"))
    assert prompt.endswith("<|im_start|>assistant\n")
    assert (chosen, rejected) == ("<think></think>\n\na<|im_end|>", "<think></think>\n\nb<|im_end|>")
    assert notes == ("empty_reasoning",)
    assert encode(templated(SHAPES["opens"]), asked("a", "b"))[1:] == (
        "\n</think>\n\na<|im_end|>",
        "\n</think>\n\nb<|im_end|>",
        ("empty_reasoning",),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_an_answer_that_stands_in_the_name_of_its_end_token_has_one_end_token_as_any_other(shape):
    tokenizer = templated(SHAPES[shape])
    usual = encode(tokenizer, asked("Yes", "No"))[1]
    for answer in ("d", "im", "_", "|>", "end", "o", "end text"):
        chosen = encode(tokenizer, asked(answer, "No"))[1]
        written = answer.upper() if shape == "capitals" else answer
        assert chosen == usual.replace("YES" if shape == "capitals" else "Yes", written)


def test_turns_of_a_trajectory_whose_answers_stand_in_the_name_of_their_end_token_end_with_it():
    said = ("user", "Which?"), ("assistant", "d"), ("user", "end"), ("assistant", "im")
    turns = [{"role": role, "content": content} for role, content in said]
    row = {"chosen": turns, "rejected": [*turns[:1], {"role": "assistant", "content": "e"}]}
    for shape in ("plain", "trims", "alternates", "ends twice"):
        tokenizer, options = templated(SHAPES[shape]), PairOptions(responses="assistant", **WIDE)
        [result] = PairTokenizer(tokenizer, options).encode([to_record(row, options)])
        ids, mask = result.pair.responses[0]
        text = [tokenizer.decode(run) for run in (ids[mask], ids[~mask])]
        assert text == ["d<|im_end|>im<|im_end|>", "\n<|im_start|>user\nend<|im_end|>\n<|im_start|>assistant\n"], shape


# Special tokens around the role, and another end for the last turn, as gpt-oss has.
HEADERS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|endoftext|>{{ m.content }}"
    "{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|endoftext|>{% endif %}"
)


@pytest.mark.parametrize("template", [SHAPES["channels"], SHAPES["capitals"], HEADERS])
def test_an_answer_that_stands_in_the_header_of_the_next_turn_ends_before_it(template):
    tokenizer, options = templated(template), PairOptions(responses="assistant", **WIDE)

    def first_turn(answer):
        said = ("user", "Who?"), ("assistant", answer), ("user", "Sure?"), ("assistant", "Quite.")
        turns = [{"role": role, "content": content} for role, content in said]
        row = {"chosen": turns, "rejected": [*turns[:1], {"role": "assistant", "content": "None."}]}
        [result] = PairTokenizer(tokenizer, options).encode([to_record(row, options)])
        ids, mask = result.pair.responses[0]
        return tokenizer.decode(ids[: int(mask.argmin())])

    usual = first_turn("7")
    assert usual.endswith("7<|im_end|>")
    for answer in ("user", "assistant", "final", "d", "the user"):
        written = answer.upper() if template == SHAPES["capitals"] else answer
        assert first_turn(answer) == usual.replace("7", written)


def test_an_answer_may_end_in_several_special_tokens():
    ended = SHAPES["plain"].replace("<|im_end|>", "<|endoftext|><|im_end|>")
    assert encode(templated(ended), asked("a", "b"))[1:] == ("a<|endoftext|><|im_end|>", "b<|endoftext|><|im_end|>", ())


@pytest.mark.parametrize(
    ("shape", "chosen", "note"),
    [
        ("trims", "It is 4.", "blanks_left_out"),
        ("collapses", "It is 4.", "text_rewritten"),
        ("capitals", "IT  IS 4. ", "text_rewritten"),
    ],
)
def test_what_a_template_rewrites_is_counted(shape, chosen, note):
    found = encode(templated(SHAPES[shape]), asked("It  is 4. " if shape != "trims" else "It is 4. ", "no"))
    assert found[1] == chosen + "<|im_end|>"
    assert found[3] == (note,)


TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"x": "two"}}}]}
CALLS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
CALLS += "{% endfor %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
CALLS += "{% endif %}"


@pytest.mark.parametrize(
    ("template", "record", "named"),
    [
        (
            SHAPES["users only"],
            PreferenceRecord(({"role": "system", "content": "s"}, {"role": "user", "content": "usser"}), "a", "b"),
            "turn of system",
        ),
        (SHAPES["plain"], asked(tools=(TOOL,)), "the tool weather"),
        (SHAPES["plain"], asked(chosen=(CALL,)), "'add' of a call"),
        (SHAPES["plain"], asked(({"role": "assistant", "content": "4", "reasoning_content": "two"},)), "reasoning"),
        (SHAPES["plain"].replace("m.content", "m.content[:9]"), asked(prompt="What is 2+2?"), "'What is 2+2?'"),
        (SHAPES["plain"].replace("m.content", "m.content[:9]"), asked("This is text.", "no"), "'This is text.'"),
    ],
)
def test_text_that_a_template_leaves_out_refuses_the_pair(template, record, named):
    with pytest.raises(BadRecord) as refused:
        encode(templated(template), record)
    assert refused.value.reason == "template_leaves_out" and named in refused.value.detail


def test_a_call_ends_where_its_turn_ends():
    other = {**CALL, "tool_calls": [{"function": {"name": "add", "arguments": {"x": "<|im_end|>"}}}]}
    found = encode(templated(CALLS), asked((CALL,), (other,)))
    assert found[1] == '{"name": "add", "arguments": {"x": "two"}}<|im_end|>'
    assert found[2] == '{"name": "add", "arguments": {"x": "<|im_end|>"}}<|im_end|>'


def test_a_template_gets_the_arguments_of_calls_as_text_where_it_wants_them_so():
    joined = CALLS.replace("c.function | tojson", "c.function.name + ' ' + c.function.arguments")
    found = encode(templated(joined), asked((CALL,), "no"))
    assert found[1] == 'add {"x": "two"}<|im_end|>'


@pytest.mark.parametrize(
    "fault",
    ["{{ 1 / 0 }}", "{{ raise_exception('') }}", "{{ range(10**9) }}", "{{ 9.0 ** 9999 }}", "{{ messages[0].x.y.z }}"]
    + ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
)
def test_a_template_that_fails_refuses_the_pair(fault):
    with pytest.raises(BadRecord, match="template_refused"):
        encode(templated(fault + SHAPES["plain"]), asked())


def test_what_is_no_template_is_named():
    with pytest.raises(DataError, match="expected a Jinja template"):
        encode(templated("{% if %}"), asked())


def test_the_clock_is_found_and_pinned():
    assert encode(templated(CLOCK), asked())[0].startswith("26 Jul 2024<|im_start|>")
    found = encode(templated(CLOCK), asked(), chat_template_args=("strftime_now=2025-02-01",))
    assert found[0].startswith("01 Feb 2025<|im_start|>")
    identity = tokenizer_identity(templated(CLOCK), PairOptions())["chat_template"]
    assert identity == {"default": CLOCK, "date": "2024-07-26"}
    unread = "{% if false %}{{ strftime_now('%Y') }}{% endif %}" + SHAPES["plain"]
    assert tokenizer_identity(templated(unread), PairOptions())["chat_template"] == unread
    with pytest.raises(DataError, match="expected a day"):
        encode(templated(CLOCK), asked(), chat_template_args=("strftime_now=today",))


def test_arguments_are_checked_read_as_json_and_part_of_the_identity():
    options = PairOptions(chat_template_args=("a=false", "b=True", "c=[1, null]", "d=26 Jul", "e=x=y", "f=None"))
    assert options.template_arguments == {"a": False, "b": True, "c": [1, None], "d": "26 Jul", "e": "x=y", "f": None}
    for wrong in ("thinking", "=1", "messages=1", "a b=1"):
        with pytest.raises(ConfigError, match="chat_template_args"):
            PairOptions(chat_template_args=(wrong,))
    with pytest.raises(ConfigError, match="each variable once"):
        PairOptions(chat_template_args=("a=1", "a=2"))
    with pytest.raises(DataError, match="found thinkin, expected a variable"):
        chat_template_of(templated("{{ thinking }}"), PairOptions(chat_template_args=("thinkin=1",)))
    template = chat_template_of(
        templated("{{ thinking }}"), PairOptions(chat_template_args=('thinking={"a": [null]}',))
    )
    assert template.identity() == {"default": "{{ thinking }}", "arguments": {"thinking": {"a": [None]}}}


def test_named_templates_are_chosen_as_transformers_does_or_by_name():
    named = {"default": SHAPES["plain"], "tool_use": "{{ tools[0].function.name }}" + SHAPES["plain"]}
    assert encode(templated(named), asked())[0].startswith("<|im_start|>")
    assert encode(templated(named), asked(tools=(TOOL,)))[0].startswith("weather<|im_start|>")
    other = templated({"rag": "rag" + SHAPES["plain"], "tool_use": "x"})
    with pytest.raises(DataError, match="found no default .* expected one of rag, tool_use"):
        encode(other, asked())
    assert encode(other, asked(), chat_template="rag")[0].startswith("rag<|im_start|>")


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"demo"}))
def test_published_settings_accept_pairs_on_tokenizers_of_their_models(name):
    options = PRESETS[name].options
    # The models' own templates: Gemma's refuses a system turn and answers alone, Mistral's answers alone.
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    like = gemma_like if "gemma" in name else llama_like
    own = (strict if "gemma" in name or ("instruct" in name and "mistral" in name) else "") + like().chat_template
    pairs = {key: options[key] for key in ("template_mode", "chat_template") if key in options}
    prompt, chosen, rejected, _ = encode(templated(own, like), asked("It is 4.", "It is 5."), **pairs)
    assert "2+2?" in prompt and "It is 4." in chosen and "It is 5." in rejected


def test_bundled_templates_write_what_the_published_runs_did():
    turns = [("system", " Be. "), ("user", " Hi "), ("assistant", " Yo "), ("user", "Bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = {
        name: chat_template_of(gemma_like(), PairOptions(chat_template=name)).render(messages)
        for name in ("simpo-gemma2", "simpo-mistral")
    }
    assert rendered["simpo-gemma2"] == (
        "<bos><start_of_turn>user\nBe.\n\n Hi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n"
    )
    assert rendered["simpo-mistral"] == "[INST] Be.\n\n Hi [/INST] Yo <eos>[INST] Bye [/INST]"


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (asked("What is 2+2? It is 4.", "no", "What is 2+2?"), ["repeats_prompt"]),
        (asked("Hi there", "no", "Hi"), []),
        (asked("\n\nHuman: a\n\nAssistant: b", "no"), ["dialogue_in_response"]),
        (asked("USER: a\n**Assistant**: b", "no"), ["dialogue_in_response"]),
        (asked("The user: a person.", "no"), []),
        (asked("<think>\n\n</think>\n\nYes", "no"), ["empty_reasoning_in_text"]),
        (asked(THOUGHT, "no"), ["reasoning_on_one_side"]),
        (asked(tools=(TOOL,)), ["tools_not_called"]),
    ],
)
def test_what_the_texts_alone_show(record, found):
    responses = tuple(({"role": "assistant", "content": text},) for text in (record.chosen, record.rejected))
    assert findings_of_texts(record, record.prompt, responses) == found


def test_texts_that_were_rendered_before_are_counted():
    assert encode(templated(SHAPES["plain"]), asked("yes<|im_end|>", "no"))[3] == ("special_token_text",)
    for text in ("[INST] Hi [/INST]", "<start_of_turn>model", "x\n### Response:\ny", "<\uff5cUser\uff5c>", "<|user|>"):
        assert encode(templated(SHAPES["plain"]), asked(text, "no"))[3] == ("template_marks",)
    assert encode(templated(SHAPES["plain"]), asked("A list [1] of ### and <b>", "no"))[3] == ()


def sentencepiece_like():
    """A tokenizer that puts a blank in front of every text, as Llama 2's does."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", *"answer:yo", "\u2581y", "\u2581n"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("\u2581", "y"), ("\u2581", "n")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_response_behind_a_blank_gets_no_second_one():
    tokenizer = sentencepiece_like()
    options = PairOptions(chat_template="none")
    [result] = PairTokenizer(tokenizer, options).encode([PreferenceRecord("answer: ", "yes", "no")])
    pair = result.pair
    assert result.notes == ("tokenized_apart",)
    assert tokenizer.convert_ids_to_tokens(pair.chosen_ids) == ["y", "e", "s", "</s>"]
    for ids, text in ((pair.chosen_ids, "answer: yes</s>"), (pair.rejected_ids, "answer: no</s>")):
        joined = [*pair.prompt_ids[1:], *ids]
        assert tokenizer.decode(joined, clean_up_tokenization_spaces=False) == text
    [result] = PairTokenizer(tokenizer, options).encode([PreferenceRecord("answer: ", "yes?", "no")])
    assert result.notes == ("text_changed_by_tokenizer", "tokenized_apart")[::-1]


@pytest.mark.parametrize("shape", ["alternates", "channels"])
def test_conversations_rendered_at_once_are_those_rendered_alone(shape):
    options = PairOptions(responses="assistant", **WIDE)
    records = [to_record(row, options) for row in rows(60, seed=3)]
    tokenizer = PairTokenizer(templated(with_tools(SHAPES[shape])), options)
    at_once, alone = tokenizer.encode(records), [tokenizer.encode([record])[0] for record in records]
    assert len({type(found) for found in alone}) == 2, "pairs and refusals"
    for found, expected in zip(at_once, alone, strict=True):
        if isinstance(expected, BadRecord):
            assert (found.reason, found.detail) == (expected.reason, expected.detail)
        else:
            assert found == expected


@pytest.mark.parametrize("like", [llama_like, qwen_like, gemma_like])
def test_a_prompt_tokenised_once_has_the_tokens_that_it_has_before_each_response(like, monkeypatch):
    records = [to_record(row, PairOptions()) for row in (
        {"prompt": "  the answer\n", "chosen": " the people ", "rejected": "  the"},
        {"chosen": [{"role": "system", "content": "the answer "}, {"role": "user", "content": " the"},
                    {"role": "assistant", "content": "\u2581the"}],
         "rejected": [{"role": "system", "content": "the answer "}, {"role": "user", "content": " the"},
                      {"role": "assistant", "content": "the <|im_end|> answer"}]},
    )]  # fmt: skip
    if like is gemma_like:
        records.pop()  # it has no turn of system
    tokenizer = PairTokenizer(like(), PairOptions(**WIDE))
    assert tokenizer._splitter._cut_at_specials
    once = tokenizer.encode(records)
    monkeypatch.setattr(tokenizer._splitter, "_cut_at_specials", False)
    assert once == tokenizer.encode(records) and all(isinstance(found, EncodedPair) for found in once)


def test_a_special_token_that_takes_blanks_in_front_is_no_place_to_cut():
    tokenizer = templated(SHAPES["plain"])
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|pad|>", lstrip=True)]})
    assert not PairTokenizer(tokenizer, PairOptions())._splitter._cut_at_specials
