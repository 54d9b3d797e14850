"""Clean mode: one BOS, one end token, the boundary where the response begins, text stays text."""

import json

import numpy as np
import pytest
from data_tokenizers import FAMILIES, gemma_like, llama_like, qwen_like
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from simpo_megatron.data import PairOptions
from simpo_megatron.data.records import BadRecord, PreferenceRecord
from simpo_megatron.data.tokenization import PairTokenizer
from simpo_megatron.errors import DataError

WIDE = PairOptions(max_length=100_000, max_prompt_length=50_000)
HEADER = {
    "llama": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen": "<|im_start|>assistant\n",
    "gemma": "<start_of_turn>model\n",
}
END = {"llama": "<|eot_id|>", "qwen": "<|im_end|>", "gemma": "<end_of_turn>"}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\ufdd0\ufdd1"), min_size=1)


def conversation(*contents):
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents))


def encode(tokenizer, prompt, chosen="Yes.", rejected="No.", options=WIDE):
    [result] = PairTokenizer(tokenizer, options).encode([PreferenceRecord(prompt, chosen, rejected)])
    if isinstance(result, BadRecord):
        raise result
    return result


def special_ids(tokenizer):
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [conversation("Why?"), conversation("Why? ", "So.", "the\n\nans"), "Why?"])
def test_ids_are_those_of_the_whole_rendered_conversation_cut_behind_the_header(family, prompt):
    tokenizer = FAMILIES[family]()
    pair = encode(tokenizer, prompt, "\n\nwer 12 then\u00e9 \U0001f600", "what\n").pair
    messages = list(conversation(prompt) if isinstance(prompt, str) else prompt)
    for response, ids in (
        ("\n\nwer 12 then\u00e9 \U0001f600", pair.chosen_ids),
        ("what\n", pair.rejected_ids),
    ):
        whole = [*messages, {"role": "assistant", "content": response}]
        rendered = tokenizer.apply_chat_template(whole, tokenize=False)
        rendered = rendered[: rendered.rindex(END[family]) + len(END[family])]
        expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert [*pair.prompt_ids, *ids] == expected
        assert tokenizer.decode(pair.prompt_ids).endswith(HEADER[family])
        assert tokenizer.decode(ids).count(END[family]) == 1
        assert tokenizer.decode(ids[-1:]) == END[family]
    assert pair.prompt_ids.dtype == pair.chosen_ids.dtype == np.int32


@pytest.mark.parametrize("family", FAMILIES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
def test_any_text_comes_back_from_its_ids(family, prompt, chosen, rejected):
    tokenizer = FAMILIES[family]()
    [result] = PairTokenizer(tokenizer, WIDE).encode(
        [PreferenceRecord(conversation("a" + prompt), "b" + chosen + ".", "c" + rejected + ".")]
    )
    ids = result.pair.chosen_ids
    text = tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
    assert text == "b" + chosen + "."  # the letters keep the template's trim from taking anything away
    assert not special_ids(tokenizer) & set(ids[:-1].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_looks_like_a_special_token_stays_text(family):
    tokenizer = FAMILIES[family]()
    specials = [tokenizer.convert_ids_to_tokens(i) for i in special_ids(tokenizer)]
    evil = " a ".join(["ans", *specials, "wer"]) + "".join(specials) + "."
    prompt = conversation(evil)
    result = encode(tokenizer, prompt, evil, "fine")
    ids, text = result.pair.chosen_ids, tokenizer.decode(result.pair.chosen_ids)
    assert text == evil + END[family]
    assert set(ids.tolist()) & special_ids(tokenizer) == {int(ids[-1])}
    harmless = encode(tokenizer, conversation("x"), "x", "y").pair.prompt_ids
    in_prompt = [i for i in result.pair.prompt_ids.tolist() if i in special_ids(tokenizer)]
    assert in_prompt == [i for i in harmless.tolist() if i in special_ids(tokenizer)]
    assert evil in tokenizer.decode(result.pair.prompt_ids)


def test_a_response_of_special_tokens_alone_is_empty():
    with pytest.raises(BadRecord, match="empty_chosen"):
        encode(llama_like(), "Why?", " <|eot_id|><|end_of_text|> ")


def test_a_token_never_reaches_across_the_boundary():
    tokenizer, plain = llama_like(), PairOptions(chat_template="none")
    joined = tokenizer("the answer", add_special_tokens=False)["input_ids"]
    result = encode(tokenizer, "the ans", "wer", "xyz", plain)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert result.notes == ("tokenized_apart",)
    assert result.pair.prompt_ids.tolist() == [
        bos,
        *tokenizer("the ans", add_special_tokens=False)["input_ids"],
    ]
    assert result.pair.chosen_ids.tolist() == [*tokenizer("wer", add_special_tokens=False)["input_ids"], eos]
    assert [*result.pair.prompt_ids, *result.pair.chosen_ids] != [bos, *joined, eos]
    both = encode(tokenizer, "the ans", "wer", "wer 12", plain)  # the same token reaches across in both
    assert both.notes == ("tokenized_apart",)
    assert both.pair.prompt_ids.tolist() == result.pair.prompt_ids.tolist()
    clear = encode(tokenizer, "the ans", " there", " where", plain)
    assert clear.notes == ()
    assert [*clear.pair.prompt_ids, *clear.pair.chosen_ids] == [
        bos,
        *tokenizer("the ans there", add_special_tokens=False)["input_ids"],
        eos,
    ]


def test_without_a_template_texts_are_in_the_models_format_and_hold_its_special_tokens():
    tokenizer = llama_like()
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    of_template = encode(tokenizer, "Why?", "Yes.", "No.")
    plain = encode(tokenizer, written, "Yes.", "No.<|eot_id|>", PairOptions(chat_template="none"))
    assert written.startswith(tokenizer.bos_token)
    assert plain.pair.prompt_ids.tolist() == of_template.pair.prompt_ids.tolist()
    assert plain.pair.rejected_ids.tolist() == of_template.pair.rejected_ids.tolist()
    assert plain.pair.chosen_ids.tolist()[-1] == tokenizer.eos_token_id


def test_without_a_template_a_conversation_becomes_a_dialogue():
    tokenizer = qwen_like()
    pair = encode(tokenizer, conversation("a", "b", "c"), "d", "e", PairOptions(chat_template="none")).pair
    assert tokenizer.decode(pair.prompt_ids) == "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert tokenizer.decode(pair.chosen_ids) == " d<|im_end|>"


def changed(tokenizer, *, post_processor=None, normalizer=None, **arguments):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if post_processor is not None:
        backend.post_processor = post_processor
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.enable_truncation(5)
    backend.enable_padding()
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token} | arguments
    result = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    result.chat_template = tokenizer.chat_template
    return result


def test_there_is_one_bos_whatever_template_and_post_processor_add():
    tokenizer = llama_like()
    bos, name = tokenizer.bos_token_id, tokenizer.bos_token
    adds_bos = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, bos)])
    expected = encode(tokenizer, "Why?").pair.prompt_ids.tolist()
    assert expected.count(bos) == 1
    for template in (
        "{{ bos_token }}" + tokenizer.chat_template,
        tokenizer.chat_template.replace("{{ bos_token }}", ""),
    ):
        other = changed(tokenizer, post_processor=adds_bos)
        other.chat_template = template
        assert encode(other, "Why?").pair.prompt_ids.tolist() == expected
    assert qwen_like().bos_token_id is None
    assert encode(qwen_like(), "Why?").pair.prompt_ids[0] == qwen_like().convert_tokens_to_ids("<|im_start|>")


def test_an_end_token_is_added_only_where_the_template_writes_none():
    tokenizer = changed(gemma_like())
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    ids = encode(tokenizer, "Why?").pair.chosen_ids
    assert tokenizer.decode(ids) == "Yes.\n<eos>"


def test_tokenizers_that_cannot_serve_are_refused():
    with pytest.raises(DataError, match="found no eos_token"):
        PairTokenizer(changed(llama_like(), eos_token=None), WIDE)
    with pytest.raises(DataError, match="expected a fast tokenizer"):
        PairTokenizer(object(), WIDE)
    bare = changed(llama_like())
    bare.chat_template = None
    with pytest.raises(DataError, match="found princeton, expected a tokenizer with a chat template"):
        PairTokenizer(bare, PairOptions(template_mode="princeton"))
    with pytest.raises(DataError, match="expected a readable Jinja file"):
        PairTokenizer(bare, PairOptions(chat_template="missing.jinja"))


def test_a_chat_template_file_replaces_the_tokenizers_own(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(qwen_like().chat_template)
    tokenizer = changed(qwen_like())
    tokenizer.chat_template = "wrong"
    options = PairOptions(max_length=100_000, max_prompt_length=50_000, chat_template=str(path))
    got, expected = encode(tokenizer, "Why?", options=options), encode(qwen_like(), "Why?")
    assert json.dumps(got.pair.prompt_ids.tolist()) == json.dumps(expected.pair.prompt_ids.tolist())


def test_conversations_the_template_refuses_or_rewrites_are_bad_records():
    twice = ({"role": "user", "content": "a"}, {"role": "user", "content": "b"})
    with pytest.raises(BadRecord, match="roles must alternate"):
        encode(gemma_like(), twice)
    rewrites = changed(qwen_like())
    rewrites.chat_template = "{{ messages | length }}" + qwen_like().chat_template
    with pytest.raises(BadRecord, match="template_mismatch"):
        encode(rewrites, "Why?")


def test_pairs_that_become_identical_are_dropped_with_that_reason():
    composing = changed(llama_like(), normalizer=normalizers.NFC())
    with pytest.raises(BadRecord, match="same tokens"):
        encode(composing, "Why?", "caf\u00e9", "cafe\u0301")
    options = PairOptions(max_length=60, max_prompt_length=50)
    with pytest.raises(BadRecord, match="once cut"):
        encode(llama_like(), "Why? " * 50, "the " * 50 + "a", "the " * 50 + "b", options)


def test_a_cut_prompt_keeps_its_bos_and_its_end_and_a_cut_response_its_beginning():
    tokenizer = llama_like()
    options = PairOptions(max_length=60, max_prompt_length=40)
    long = encode(tokenizer, "the question " * 50, "the answer " * 50, "No.")
    cut = encode(tokenizer, "the question " * 50, "the answer " * 50, "No.", options)
    assert cut.pair.prompt_ids.tolist() == [tokenizer.bos_token_id, *long.pair.prompt_ids[-39:]]
    assert cut.pair.chosen_ids.tolist() == long.pair.chosen_ids[:20].tolist()
    assert cut.pair.rejected_ids.tolist() == long.pair.rejected_ids.tolist()
    assert cut.lost == (len(long.pair.prompt_ids) - 40, len(long.pair.chosen_ids) - 20, 0)
    drop = PairOptions(max_length=60, max_prompt_length=40, long_prompt="drop")
    with pytest.raises(BadRecord, match="too_long_prompt"):
        encode(tokenizer, "the question " * 50, "Yes.", "No.", drop)


def test_a_prompt_without_a_token_is_refused():
    options = PairOptions(chat_template="none", allow_empty_prompt=True)
    with pytest.raises(BadRecord, match="empty_prompt"):
        encode(qwen_like(), "", options=options)
    assert encode(llama_like(), "", options=options).pair.prompt_ids.tolist() == [llama_like().bos_token_id]
