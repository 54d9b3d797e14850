"""Hooks of mkdocs that write the pages made from the code: options, exit codes, presets and families.

They also draw the picture of the package's folders from the imports.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import typing
from collections import defaultdict
from pathlib import Path

import simpo_megatron
from simpo_megatron import errors
from simpo_megatron.config import Config
from simpo_megatron.config.bundled import bundled_configs
from simpo_megatron.config.options import ALIASES, Option, option_table
from simpo_megatron.config.presets import PRESETS
from simpo_megatron.data.rendering import FINDINGS

PACKAGE = Path(simpo_megatron.__file__).parent
FINDINGS_MARK = "<!-- findings -->"
# A page asks for the rooms of the package, or of one of its folders: `<!-- rooms -->`, `<!-- rooms of data -->`.
ROOMS_MARK = re.compile(r"<!-- rooms(?: of (\w+))? -->")
# Files beside the rooms that a reader should know; the others serve one room each.
_LONE_FILES = (
    "atomic",
    "cli",
    "parallel",
    "ranks",
    "dataset",
    "model",
    "specs",
    "device",
    "launch",
    "run",
    "session",
    "loop",
)


def on_files(files: typing.Any, config: typing.Any) -> typing.Any:
    """Adds the generated pages to the files of the site."""
    from mkdocs.structure.files import File

    check_public_names()
    for name, text in generated_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: typing.Any) -> str:
    """Puts the picture of the rooms, and the table of findings, where a page asks for it."""
    if FINDINGS_MARK in markdown:
        markdown = markdown.replace(FINDINGS_MARK, findings_table())
    return ROOMS_MARK.sub(lambda mark: rooms_picture(mark[1]) + (rooms_table(mark[1]) if mark[1] else ""), markdown)


def generated_pages() -> dict[str, str]:
    """The generated pages by their names."""
    return {
        "reference/options.md": options_page(),
        "reference/exit_codes.md": exit_codes_page(),
        "reference/presets.md": presets_page(),
        "reference/families.md": families_page(),
    }


def findings_table() -> str:
    """The oddities of pairs that are counted."""
    return "\n".join(
        ["| name | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in FINDINGS.items())]
    )


def check_public_names() -> None:
    """Raises ValueError when a name of the public interface has no docstring."""
    bare = [name for name in simpo_megatron.__all__ if name != "__version__" and not _documented(name)]
    if bare:
        raise ValueError(f"public names: found {', '.join(bare)} without a docstring")


def _documented(name: str) -> bool:
    return bool(inspect.getdoc(getattr(simpo_megatron, name)))


def options_page() -> str:
    """Every option: its flag, its values, its default and its help."""
    sections: dict[str, list[Option]] = defaultdict(list)
    for option in option_table().values():
        sections[option.section].append(option)
    lines = [
        "# Options",
        "",
        "Each option is a flag (`--weight-decay 0.1`), a key of a YAML file (`weight_decay: 0.1`) and a keyword of",
        "`load_config(weight_decay=0.1)`. The command line wins over the file, and the file over the preset.",
        "`--help` shows the options in bold, `--help-all` all of them.",
        "",
    ]
    types = typing.get_type_hints(Config)
    for section, options in sections.items():
        lines += [f"## {section}", "", _first_line(types[section], section), ""]
        lines += ["| option | values | default | meaning |", "|---|---|---|---|"]
        lines += [_option_row(option) for option in options]
        lines.append("")
    return "\n".join(lines)


def _first_line(section_type: type, section: str) -> str:
    if section == "objective":
        return "The loss. Options that only some objectives have say so."
    return (inspect.getdoc(section_type) or "").splitlines()[0]


def _option_row(option: Option) -> str:
    flags = [f"--{alias.replace('_', '-')}" for alias, name in ALIASES.items() if name == option.name]
    flags.append(f"--{option.name.replace('_', '-')}")
    shown = "<br>".join(f"**`{flag}`**" if option.everyday else f"`{flag}`" for flag in flags)
    if option.choices:
        values = ", ".join(f"`{choice}`" for choice in option.choices)
    else:
        values = {bool: "on or off", int: "whole number", float: "number", str: "text"}[option.kind]
    if option.is_list:
        values += ", several"
    default = "" if option.default in (None, ()) else f"`{_plain(option.default)}`"
    return f"| {shown} | {_cell(values)} | {_cell(default)} | {_cell(option.help)} |"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def exit_codes_page() -> str:
    """Every exit code, and the error that ends a process with it."""
    classes = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.SimPOError) and "exit_code" in vars(value)
    ]
    lines = [
        "# Exit codes",
        "",
        "A run that fails ends with one line, `ERROR simpo_megatron rank N: KEY: found X, expected Y; what to do`, and",
        "with one of these codes. `torchrun` itself exits with 1 whatever its ranks return; its report names the code.",
        "",
        "| code | error | meaning |",
        "|---|---|---|",
        "| 0 | | The work is done. |",
    ]
    for kind in sorted(classes, key=lambda kind: kind.exit_code):
        meaning = "An unexpected error; the line names it." if kind is errors.SimPOError else _meaning(kind)
        lines.append(f"| {kind.exit_code} | `{kind.__name__}` | {_cell(meaning)} |")
    lines += ["| 128 + N | | Signal N ended a rank, as in a shell. |", ""]
    lines += ["[What to do about the common lines](../guides/troubleshooting.md)."]
    return "\n".join(lines)


def _meaning(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")


def presets_page() -> str:
    """The presets with what they set, and the configurations that come with the package."""
    lines = [
        "# Presets and configurations",
        "",
        "`--preset NAME` starts from published settings; the flags and the file of a run override them. Values are",
        "from the README and `training_configs/` of the reference implementation,",
        "[princeton-nlp/SimPO](https://github.com/princeton-nlp/SimPO).",
        "",
    ]
    shared = set.intersection(
        *(
            {(key, str(value)) for key, value in preset.options.items()}
            for name, preset in PRESETS.items()
            if name != "demo"
        )
    )
    lines += [
        "All published ones: " + ", ".join(f"`{key} {_plain_text(value)}`" for key, value in sorted(shared)) + ".",
        "",
    ]
    lines += ["| preset | model and pairs | settings of its own |", "|---|---|---|"]
    for name, preset in PRESETS.items():
        own = {key: value for key, value in preset.options.items() if (key, str(value)) not in shared}
        settings = ", ".join(f"`{key} {_plain(value)}`" for key, value in own.items())
        lines.append(f"| `{name}` | {_cell(preset.summary)} | {_cell(settings)} |")
    lines += ["", "## Configurations", "", "`--config NAME` finds one of these in the package.", ""]
    lines += ["| name | what it is |", "|---|---|"]
    for name, path in bundled_configs().items():
        comments = itertools.takewhile(
            lambda line: line.startswith("# "), path.read_text(encoding="utf-8").splitlines()
        )
        text = " ".join(line.removeprefix("# ") for line in comments if not line.startswith("#   "))
        lines.append(f"| `{name}` | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def _plain_text(value: str) -> str:
    return {"True": "on", "False": "off"}.get(value, value)


def families_page() -> str:
    """The model families, with models of each and the tests that prove it."""
    from simpo_megatron.mcore.families import FAMILIES

    lines = [
        "# Model families",
        "",
        "`model_type` in a model's `config.json` names its family. A `config.json` that asks for more than is tested",
        "is refused, and the line names the key. `simpo families` prints this table. With `--prove NAME` it compares",
        "small random models with transformers on your machine: logits, and every tensor of an export.",
        "",
        "| family | models | small models that are compared |",
        "|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        models, tests = (
            ", ".join(f"`{model}`" for model in family.examples),
            ", ".join(f"`{test}`" for test in family.tests),
        )
        lines.append(f"| `{name}` | {models} | {tests} |")
    lines += [
        "",
        "## A model that is not in the list",
        "",
        "A new model often has the `model_type` of a known family; then it trains without a change. Otherwise the run",
        "is refused before it starts. A family is one file in `simpo_megatron/mcore/families/`: options of",
        "`config.json`, names of weights, and small models to test. Then `simpo families --prove NAME` compares it",
        "with transformers. CONTRIBUTING.md in the repository has the steps.",
    ]
    return "\n".join(lines) + "\n"


def rooms_picture(folder: str | None = None) -> str:
    """A mermaid graph of the rooms of the package or of a folder of it: arrows of imports, without shortcuts."""
    base = PACKAGE / (folder or "")
    imports = _room_imports(base)
    kept = {
        room: {other for other in others if not _reaches(imports, others - {other}, other)}
        for room, others in imports.items()
    }
    lines = ["```mermaid", "graph TD"]
    shown = {path.stem for path in base.iterdir() if path.is_dir() or path.stem in _LONE_FILES}
    lines += [f"  {room} --> {other}" for room in sorted(shown & set(kept)) for other in sorted(kept[room] & shown)]
    return "\n".join([*lines, "```"])


def rooms_table(folder: str) -> str:
    """The rooms of a folder of the package, each with the first sentence of its docstring."""
    doors = sorted((PACKAGE / folder).glob("*/__init__.py"))
    rows = [(door.parent.name, ast.get_docstring(ast.parse(door.read_text(encoding="utf-8")))) for door in doors]
    lines = ["", "", "| room | task |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {_cell((text or '').splitlines()[0])} |" for name, text in rows)])


def _room_imports(base: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    above = base.relative_to(PACKAGE.parent).parts
    for path in base.rglob("*.py"):
        room = path.relative_to(base).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                *inside, other = (node.module or "").split(".")[: len(above) + 1]
                if tuple(inside) == above and other != room:
                    found[room].add(other)
    return found


def _reaches(imports: dict[str, set[str]], starts: set[str], goal: str) -> bool:
    seen, waiting = set(starts), list(starts)
    while waiting:
        for other in imports.get(waiting.pop(), ()):
            if other == goal:
                return True
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return False
