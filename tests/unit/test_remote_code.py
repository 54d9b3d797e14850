"""Code that comes with a model is never run, and nobody is asked whether it may be."""

from __future__ import annotations

import json

import pytest

from simpo_megatron.data import load_tokenizer
from simpo_megatron.errors import SimPOError
from simpo_megatron.mcore.families import describe_hf_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    code = f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Custom:\n    pass\n"
    (tmp_path / "custom.py").write_text(code)
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "custom.Custom")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "custom", "auto_map": auto_map}))
    tokenizer = {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    return tmp_path


@pytest.mark.parametrize("load", [load_tokenizer, describe_hf_model])
def test_a_folder_with_code_of_its_own_is_refused_unasked(folder, load):
    with pytest.raises(SimPOError):
        load(folder)
    assert not (folder / "pwned").exists()
