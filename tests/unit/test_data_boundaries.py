"""The boundary of a response, shown by ids alone: the one that offsets show, and only where tokens are bytes."""

import json
import random

import pytest
from data_tokenizers import gemma_like, llama_like, qwen_like
from test_data_rendering import WIDE, templated
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from simpo_megatron.data import PairOptions
from simpo_megatron.data.records import PreferenceRecord
from simpo_megatron.data.tokenization import EncodedPair, PairTokenizer
from simpo_megatron.data.tokenization.backends import has_byte_tokens

WORDS = ("the", " ans", "\n", "\n\n", "  ", "\u00e9", "e\u0301", "\U0001f600", "<|im_end|>", "12", ":", "\u2028")
ONE_TOKEN_HEADER = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def records(count):
    numbers = random.Random(5)
    for _ in range(count):
        texts = ("".join(numbers.choices(WORDS, k=numbers.randint(1, 4))) + numbers.choice("xyz") for _ in range(3))
        yield PreferenceRecord(*texts)


def joins_newlines():
    """A tokenizer with a token of two newlines, of which its template writes one at a header's end."""
    spec = json.loads(qwen_like().backend_tokenizer.to_str())
    spec["model"]["vocab"]["\u010a\u010a"] = 1 + max(token["id"] for token in spec["added_tokens"])
    spec["model"]["merges"].append(["\u010a", "\u010a"])
    plain = Tokenizer.from_str(json.dumps(spec))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=qwen_like().eos_token)
    tokenizer.chat_template = qwen_like().chat_template
    return tokenizer


def used(found):
    return {place: pair for place, pair in enumerate(found) if isinstance(pair, EncodedPair)}


@pytest.mark.parametrize(
    ("tokenizer", "joins_headers"),
    [(llama_like, False), (joins_newlines, True), (lambda: templated(ONE_TOKEN_HEADER), False)],
)
def test_ids_alone_show_the_boundary_that_offsets_show(tokenizer, joins_headers, monkeypatch):
    pairs = list(records(300))
    tokenizer = PairTokenizer(tokenizer(), PairOptions(**WIDE))
    by_ids = tokenizer._splitter._split_behind_headers
    shown = []

    def recorded(*arguments):
        shown.extend(by_ids(*arguments))
        return shown

    monkeypatch.setattr(tokenizer._splitter, "_split_behind_headers", recorded)
    found = used(tokenizer.encode(pairs))
    monkeypatch.setattr(tokenizer._splitter, "_has_byte_tokens", False)
    assert found == used(tokenizer.encode(pairs)) and len(found) > 250
    num_joined = shown.count(None)
    assert 0 < num_joined < len(shown) / 2 if joins_headers else num_joined == 0, "tokens join blanks to a header"


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(normalizer={"type": "NFC"}),
        lambda spec: spec["model"].update(dropout=0.1),
        lambda spec: spec["model"]["vocab"].update(unseen=spec["model"]["vocab"].pop("\u0100")),
        lambda spec: spec["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda spec: spec["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda spec: spec["added_tokens"][0].update(rstrip=True),
    ],
)
def test_tokens_that_may_stand_for_other_bytes_need_offsets(change):
    spec = json.loads(qwen_like().backend_tokenizer.to_str())
    assert has_byte_tokens(Tokenizer.from_str(json.dumps(spec)))
    change(spec)
    assert not has_byte_tokens(Tokenizer.from_str(json.dumps(spec)))


def test_tokens_of_sentencepiece_need_offsets():
    assert not has_byte_tokens(gemma_like().backend_tokenizer)
