"""The end of a run: what is written about a model costs a warning where it cannot be made, never the model."""

import json

import pytest
import torch
from jinja2 import DictLoader, Environment

from simpo_megatron.mcore import cpu_patches

cpu_patches.install()

from simpo_megatron.config import config_from  # noqa: E402
from simpo_megatron.reporting import rendering, run_report  # noqa: E402
from simpo_megatron.training import finish  # noqa: E402

BROKEN = {"run_report.html": "{% for x in %}", "model_card.md": "{{ 1 / 0 }}"}


class Said(list):
    say = list.append


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The configuration of a run whose pages have broken templates."""
    monkeypatch.setattr(finish.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(run_report, "draw_curves", lambda curves, config, path: path.write_bytes(b""))
    monkeypatch.setattr(rendering, "_environment", lambda: Environment(loader=DictLoader(BROKEN), autoescape=True))
    line = {"iteration": 1, "loss": 1.0, "rewards/margins": 0.1, "rewards/accuracies": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "config.yaml").write_text("model: m\ndata: [a]\n")
    return config_from(model="m", data=("a",), save=str(tmp_path))


def test_a_report_whose_template_fails_costs_a_warning(config, tmp_path):
    said = Said()
    finish._report(config, said)
    (line,) = said
    assert line.startswith("WARNING   no report was written: Template") and line.endswith(f"simpo report {tmp_path}")


def test_a_model_card_that_cannot_be_made_costs_a_warning(config):
    said = Said()
    assert finish._card(config, said, "hf", None, torch.bfloat16) is None
    assert said == ["WARNING   hf has no model card: ZeroDivisionError: division by zero"]
