"""Chat templates beside a model's weights, in the forms that transformers reads: files, or a list in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpo_megatron.errors import CheckpointError
from simpo_megatron.limits import read_bounded
from simpo_megatron.mcore.hf import MAX_JSON_BYTES, read_hf_json

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
NAMED_FOLDER = "additional_chat_templates"

_CHOSEN_BY_RULE = ("default", "tool_use")
"""Names that transformers chooses where nobody names a template: the second for conversations with tools."""


def complete_templates(source: Path, target: Path, *, flat: bool, trained: str | None) -> None:
    """Write the templates of `source` into `target` that copying its files does not bring there.

    Args:
        flat: `target` has no subfolders, so named templates go into a list in tokenizer_config.json.
        trained: the template that replaces the one transformers would choose; None: none.
    """
    templates, in_list = _read(source)
    wanted = dict(templates)
    if trained is not None:
        wanted |= {name: trained for name in _CHOSEN_BY_RULE if name == "default" or name in templates}
    is_named = len(wanted) > 1
    # The name becomes a file name, and the folder is not trusted.
    if any(Path(name).name != name for name in wanted):
        return
    if wanted != templates or (is_named and flat != in_list):
        _write(target, wanted, as_list=is_named and flat)


def _read(folder: Path) -> tuple[dict[str, str], bool]:
    """(templates by name, whether a list holds them); as in transformers, files win over tokenizer_config.json.

    Raises:
        CheckpointError: one of the files is not UTF-8 text.
    """
    named = sorted((folder / NAMED_FOLDER).glob("*.jinja"))
    found = {path.stem: _text(path) for path in named if path.is_file()}
    if (folder / TEMPLATE_FILE).is_file():
        found["default"] = _text(folder / TEMPLATE_FILE)
    if found or not (folder / CONFIG_FILE).is_file():
        return found, False
    known = read_hf_json(folder, CONFIG_FILE).get("chat_template")
    if isinstance(known, str):
        return {"default": known}, False
    items = known if isinstance(known, list) else []
    return {str(item["name"]): str(item["template"]) for item in items if _is_template(item)}, bool(items)


def _text(path: Path) -> str:
    try:
        return read_bounded(path, MAX_JSON_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}), expected a chat template in UTF-8") from None


def _is_template(item: Any) -> bool:
    return isinstance(item, Mapping) and {"name", "template"} <= item.keys()


def _write(folder: Path, templates: Mapping[str, str], *, as_list: bool) -> None:
    config = read_hf_json(folder, CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    before = dict(config)
    config.pop("chat_template", None)
    if as_list:
        (folder / TEMPLATE_FILE).unlink(missing_ok=True)
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    else:
        for name, text in templates.items():
            path = folder / (TEMPLATE_FILE if name == "default" else f"{NAMED_FOLDER}/{name}.jinja")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if config != before:
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
