"""Chat templates beside exported weights: all of the tokenizer's, and first the one that was trained with."""

import json
import shutil

import pytest
from data_tokenizers import qwen_like
from transformers import PreTrainedTokenizerFast

from simpo_megatron.config import config_from
from simpo_megatron.convert.folder import copy_model_files
from simpo_megatron.data import PairOptions, chosen_template, load_tokenizer


@pytest.fixture
def templated_model(tmp_path):
    """The folder of a tokenizer with named templates."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=qwen_like().backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").rglob("*.jinja"))) == 3
    return tmp_path / "model"


def copied(source, name, **options):
    target = source.parent / name
    target.mkdir()
    copy_model_files(source, target, **options)
    return target, load_tokenizer(target).chat_template


def test_named_templates_survive_in_a_checkpoint_of_plain_files(templated_model):
    known = load_tokenizer(templated_model).chat_template
    checkpoint, in_checkpoint = copied(templated_model, "checkpoint", flat=True)
    assert all(path.is_file() for path in checkpoint.iterdir()) and in_checkpoint == known
    export, in_export = copied(checkpoint, "export")
    assert in_export == known
    names = {str(path.relative_to(export)) for path in export.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(templated_model)) for path in templated_model.rglob("*") if path.is_file()}
    for name in names:
        if name != "tokenizer_config.json":
            assert (export / name).read_bytes() == (templated_model / name).read_bytes()
    again, in_again = copied(checkpoint, "again", flat=True)
    assert (
        in_again == known
        and (again / "tokenizer_config.json").read_bytes() == (checkpoint / "tokenizer_config.json").read_bytes()
    )


def test_the_template_that_was_trained_with_is_the_one_that_transformers_chooses(templated_model):
    for name, flat in (("checkpoint", True), ("export", False)):
        _, found = copied(templated_model, name, flat=flat, chat_template="{{ trained }}")
        assert found == {"default": "{{ trained }}", "tool_use": "{{ trained }}", "rag": "{{ documents }}"}
    _, found = copied(templated_model.parent / "checkpoint", "from_checkpoint")
    assert found["default"] == found["tool_use"] == "{{ trained }}"


@pytest.mark.parametrize("trained", [None, "{{ trained }}"])
def test_a_single_template_stays_where_it_is_unless_another_was_trained_with(templated_model, trained):
    shutil.rmtree(templated_model / "additional_chat_templates")
    (templated_model / "chat_template.jinja").unlink()
    config = json.loads((templated_model / "tokenizer_config.json").read_text()) | {"chat_template": "{{ own }}"}
    (templated_model / "tokenizer_config.json").write_text(json.dumps(config))
    for name, flat in (("checkpoint", True), ("export", False)):
        target, found = copied(templated_model, name, flat=flat, chat_template=trained)
        assert found == (trained or "{{ own }}")
        is_as_it_was = (target / "tokenizer_config.json").read_text() == json.dumps(config)
        assert is_as_it_was == (trained is None)


def test_the_name_of_a_template_is_no_path(templated_model):
    shutil.rmtree(templated_model / "additional_chat_templates")
    (templated_model / "chat_template.jinja").unlink()
    items = [{"name": name, "template": "x"} for name in ("default", "../../evil")]
    config = json.loads((templated_model / "tokenizer_config.json").read_text()) | {"chat_template": items}
    (templated_model / "tokenizer_config.json").write_text(json.dumps(config))
    copied(templated_model, "export")
    assert not list(templated_model.parent.rglob("*evil*"))


def test_the_template_of_a_run_is_its_text_wherever_it_came_from(tmp_path, templated_model):
    tokenizer = load_tokenizer(templated_model)
    (tmp_path / "own.jinja").write_text("{{ trained }}")
    assert chosen_template(tokenizer, PairOptions(chat_template=str(tmp_path / "own.jinja"))) == "{{ trained }}"
    assert chosen_template(tokenizer, PairOptions(chat_template="rag")) == "{{ documents }}"
    assert chosen_template(tokenizer, PairOptions(chat_template="simpo-mistral")).startswith("{")
    inline = "{% for message in messages %}{{ message.content }}/../{% endfor %}"
    assert chosen_template(tokenizer, config_from(chat_template=inline, model="m").pairs) == inline
    for name in ("", "none"):
        assert chosen_template(tokenizer, PairOptions(chat_template=name)) is None
