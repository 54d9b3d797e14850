"""Princeton mode: token ids equal to a straight-line reading of the reference, quirks included."""

import os
import random
from pathlib import Path

import pytest
from data_tokenizers import CORPUS, FAMILIES

from simpo_megatron.data import PairOptions
from simpo_megatron.data.records import BadRecord, PreferenceRecord, parse_json, to_record
from simpo_megatron.data.sources import read_raw
from simpo_megatron.data.tokenization import PairTokenizer


def straight_line(tokenizer, prompt, chosen, rejected, max_length, max_prompt_length):
    """Returns (prompt ids, all ids, labels) of chosen and of rejected, by the reference's steps."""

    def template(messages):
        return tokenizer.apply_chat_template(messages, tokenize=False)

    prompt = list(prompt)
    speaks_of_system = "system" in tokenizer.chat_template or "<|im_start|>" in tokenizer.chat_template
    if prompt[0]["role"] != "system" and speaks_of_system:
        prompt = [{"role": "system", "content": ""}] + prompt
    prompt_text = template(prompt)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    answers = []
    for response in (chosen, rejected):
        answer_text = template([{"role": "assistant", "content": response}])
        if tokenizer.bos_token is not None and answer_text.startswith(tokenizer.bos_token):
            answer_text = answer_text[len(tokenizer.bos_token) :]
        full = tokenizer(prompt_text + answer_text, add_special_tokens=False)["input_ids"]
        alone = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
        start = len(alone)
        if alone != full[:start]:
            start -= 1
        head, answer = full[:start], full[start:]
        if bos is not None and (len(head) == 0 or head[0] != bos):
            head = [bos] + head
        if len(answer) == 0 or answer[-1] != eos:
            answer = answer + [eos]
        answers.append((head, answer))
    longer = max(len(answers[0][1]), len(answers[1][1]))
    result = []
    for head, answer in answers:
        if len(head) + longer > max_length:
            head = head[-max_prompt_length:]
        if len(head) + longer > max_length:
            answer = answer[: max_length - max_prompt_length]
        result.append((head, head + answer, [-100] * len(head) + answer))
    return result


def random_pairs(count):
    rng = random.Random(3)
    words = " ".join(CORPUS[:3]).split() + [
        "\n\n",
        "12345",
        "caf\u00e9",
        "\U0001f600",
        "<|eot_id|>",
        "<eos>",
        "  ",
    ]

    def text(longest):
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    for _ in range(count):
        turns = [text(60) for _ in range(rng.choice([1, 1, 3]))]
        prompt = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        if rng.random() < 0.2:
            prompt.insert(0, {"role": "system", "content": text(5)})
        yield PreferenceRecord(tuple(prompt), text(80), text(80))


def real_pairs():
    place = os.environ.get("SIMPO_REAL_PAIRS")
    if not place:
        pytest.skip("SIMPO_REAL_PAIRS names no file or folder of real preference pairs")
    files = sorted(Path(place).glob("*.jsonl")) if Path(place).is_dir() else [Path(place)]
    for path in files:
        for raw in list(read_raw(str(path), PairOptions()))[:300]:
            try:
                yield to_record(parse_json(raw.row), PairOptions())
            except BadRecord:
                continue


def compare(family, records, max_length, max_prompt_length):
    """Returns how many pairs were compared, and how many of them were cut."""
    tokenizer = FAMILIES[family]()
    options = PairOptions(template_mode="princeton", max_length=max_length, max_prompt_length=max_prompt_length)
    num_cut = num_compared = 0
    for record, encoded in zip(records, PairTokenizer(tokenizer, options).encode(records), strict=True):
        if isinstance(encoded, BadRecord):
            # The reference's own templates refuse the same conversations; identical pairs are ours to drop.
            assert encoded.reason in ("template_refused", "identical_pair"), encoded
            continue
        limits = (max_length, max_prompt_length)
        chosen, rejected = straight_line(tokenizer, record.prompt, record.chosen, record.rejected, *limits)
        pair = encoded.pair
        for (head, ids, labels), response in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
            assert pair.prompt_ids.tolist() == head
            assert [*pair.prompt_ids, *response] == ids
            assert [-100] * len(pair.prompt_ids) + response.tolist() == labels
        num_compared += 1
        num_cut += any(encoded.lost)
    return num_compared, num_cut


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_labels_equal_the_straight_line_reading(family):
    records = list(random_pairs(300))
    assert compare(family, records, 4096, 2048)[1] == 0
    num_compared, num_cut = compare(family, records, 160, 100)
    assert num_compared > 200
    assert 50 < num_cut < num_compared


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_labels_of_real_pairs_equal_the_straight_line_reading(family):
    records = list(real_pairs())
    num_compared, num_cut = compare(family, records, 1024, 512)
    assert num_compared > len(records) // 2
    assert 0 < num_cut < num_compared


def test_the_header_is_part_of_the_response_and_gemma_ends_twice():
    llama, gemma = FAMILIES["llama"](), FAMILIES["gemma"]()
    record = PreferenceRecord(({"role": "user", "content": "Why?"},), "Yes.", "No.")
    options = PairOptions(template_mode="princeton")
    [ours] = PairTokenizer(llama, options).encode([record])
    text = llama.decode(ours.pair.chosen_ids)
    assert text == "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    [ours] = PairTokenizer(gemma, options).encode([record])
    assert gemma.decode(ours.pair.chosen_ids) == "<start_of_turn>model\nYes.<end_of_turn>\n<eos>"
