"""The folder of an export: its weight files, the other files of a model, and its atomic publication."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo_megatron import __version__, atomic
from simpo_megatron.convert.chat_templates import NAMED_FOLDER, complete_templates
from simpo_megatron.data.tokenizer_files import MAX_TOKENIZER_BYTES, TOKENIZER_FILES
from simpo_megatron.errors import CheckpointError
from simpo_megatron.limits import check_plain
from simpo_megatron.mcore.hf import INDEX_FILE, SINGLE_FILE, own_file, read_hf_json, without_code

if TYPE_CHECKING:
    from simpo_megatron.convert.files import TensorSpec

_LOGGER = logging.getLogger(__name__)

MARKER_FILE = "simpo_megatron.json"
"""The mark that tells an export from a folder of the user's."""

_ORIGIN = "origin"
# The same name as in checkpoint.manifest, which this room may not import.
_RECORD_FILE = "COMMIT.json"

MAX_SHARD_BYTES = 5 * 10**9
"""Size at which weights are divided over files, as transformers does."""

_LICENCES = ("LICENSE*", "NOTICE*")
_MODEL_FILES = ("generation_config.json", *_LICENCES)
_MAY_NAME_CODE = ("tokenizer_config.json", "generation_config.json")


def refuse_existing_export(out_folder: str | Path, *sources: str | Path) -> None:
    """Return if an export can use `out_folder`; for a check before the work.

    Args:
        sources: folders of the models that the export is made of.

    Raises:
        CheckpointError: `out_folder` is a source or contains one; or it exists and is neither empty nor an earlier
            export, which a new one replaces or renames.
    """
    path = Path(out_folder)
    for source in sources:
        if path.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
            raise CheckpointError(
                f"{path}: found the model that the export is made of, {source}, expected another folder; name one"
            )
    if not path.exists() or (path / MARKER_FILE).is_file():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise CheckpointError(
            f"{path}: found files that simpo_megatron did not write, expected none; remove them or name another folder"
        )


@contextmanager
def new_output(out_folder: Path, origin: str | None = None) -> Iterator[Path]:
    """Yields a draft folder, which replaces `out_folder` at the end; after an error it is deleted.

    An export there that is not known to have the same `origin` is renamed, not deleted. Drafts that killed processes
    left of the same output are deleted.

    Raises:
        CheckpointError: another process is writing the same output, or the place cannot be written.
    """
    try:
        own = None if origin is None else hashlib.sha256(origin.encode("utf-8", "surrogateescape")).hexdigest()
        is_anothers = out_folder.is_dir() and any(out_folder.iterdir()) and (own is None or _origin(out_folder) != own)
        with atomic.new_folder(out_folder) as draft:
            yield draft
            if own is not None:
                # A hash: the name of a folder may be private, and the export is published.
                write_json(draft / MARKER_FILE, {**read_hf_json(draft, MARKER_FILE), _ORIGIN: own})
            if is_anothers:
                aside = atomic.move_aside(out_folder)
                _LOGGER.warning("%s: moved aside to %s, because another run exported it", out_folder, aside.name)
    except BlockingIOError:
        raise CheckpointError(
            f"{out_folder}: found another process writing it, expected none; wait for it or name another folder"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{out_folder}: could not be written ({error.strerror})") from error


def origin_of(folder: str | Path) -> str:
    """The origin of an export of `folder`: the run's folder for any of its checkpoints, or the model's folder."""
    path = Path(folder).resolve()
    return str(path.parent if (path / _RECORD_FILE).is_file() else path)


def _origin(folder: Path) -> object:
    """The hash of the origin of an earlier export in `folder`; None where none is known."""
    try:
        return read_hf_json(folder, MARKER_FILE).get(_ORIGIN)
    except CheckpointError:
        return None


def divide(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[dict[str, TensorSpec]]:
    """`specs` in their order, split into parts of at most `max_shard_bytes`, or of a single tensor."""
    parts: list[dict[str, TensorSpec]] = []
    num_bytes = max_shard_bytes
    for name, spec in specs.items():
        if num_bytes + spec.num_bytes > max_shard_bytes:
            parts.append({})
            num_bytes = 0
        parts[-1][name] = spec
        num_bytes += spec.num_bytes
    return parts


def file_names(num_files: int) -> list[str]:
    """The names transformers gives to the weights of a model that lie in `num_files` files."""
    if num_files == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)]


def complete_folder(
    staging: Path,
    source_folder: Path,
    hf_config: Mapping[str, Any],
    files: Mapping[str, Mapping[str, TensorSpec]],
    model_card: str | None = None,
    chat_template: str | None = None,
    tokenizer_folder: Path | None = None,
) -> None:
    """Write everything beside the weights: the index of `files`, configuration, tokenizer, model card and marker."""
    write_json(staging / "config.json", _with_dtype(hf_config, files))
    if len(files) > 1:
        weight_map = {name: file for file, specs in files.items() for name in specs}
        num_bytes = sum(spec.num_bytes for specs in files.values() for spec in specs.values())
        write_json(staging / INDEX_FILE, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    copy_model_files(source_folder, staging, chat_template=chat_template, tokenizer_folder=tokenizer_folder)
    mark(staging, model_card)


def mark(staging: Path, model_card: str | None = None) -> None:
    """Write the model card, and the marker that tells a later export that it may replace this one."""
    if model_card is not None:
        (staging / "README.md").write_text(model_card, encoding="utf-8")
    write_json(staging / MARKER_FILE, {"exported_by": "simpo_megatron", "version": __version__})


def copy_model_files(
    source_folder: Path,
    target: Path,
    *,
    flat: bool = False,
    chat_template: str | None = None,
    tokenizer_folder: Path | None = None,
) -> None:
    """Copy a model's files besides weights and config.json: tokenizer, chat templates, licence.

    A model's code is not copied, nor the keys that name it.

    Args:
        flat: make no subfolders, for checkpoints, whose manifest lists only files. Named templates then go into
            tokenizer_config.json; an export writes them as files again.
        chat_template: the template of the training, which replaces the tokenizer's own; None: its own.
        tokenizer_folder: the folder of the tokenizer and its templates; None: `source_folder`.

    Raises:
        CheckpointError: a file is a link to something outside the model, cannot be read, or is not JSON where it should
            be.
    """
    _copy_files(source_folder, target, _MODEL_FILES, flat=flat)
    copy_tokenizer(tokenizer_folder or source_folder, target, flat=flat, chat_template=chat_template)


def copy_tokenizer(folder: Path, target: Path, *, flat: bool = False, chat_template: str | None = None) -> None:
    """Copy the tokenizer in `folder` and its chat templates.

    Args and Raises: as `copy_model_files`.
    """
    _copy_files(folder, target, TOKENIZER_FILES, flat=flat)
    complete_templates(folder, target, flat=flat, trained=chat_template)


def _copy_files(folder: Path, target: Path, patterns: Sequence[str], *, flat: bool) -> None:
    for path, own in _files_to_copy(folder, patterns):
        if flat and path.parent != folder:
            continue
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        content = read_hf_json(folder, path.name) if path.name in _MAY_NAME_CODE else {}
        if without_code(content) != content:
            write_json(copy, without_code(content))
        else:
            shutil.copyfile(own, copy)


def check_model_files(source_folder: Path) -> None:
    """Return if `copy_model_files` can copy all files of a model; for a check before the work.

    Raises:
        CheckpointError: as `copy_model_files`.
    """
    for path, _ in _files_to_copy(source_folder, _MODEL_FILES + TOKENIZER_FILES):
        if path.name in _MAY_NAME_CODE:
            read_hf_json(source_folder, path.name)


def _files_to_copy(folder: Path, patterns: Sequence[str]) -> list[tuple[Path, Path]]:
    """(file, its target with links resolved) of each file in `folder` that `patterns` match.

    Raises:
        CheckpointError: one is a link to something outside the model, or no file of a size to be read at once.
    """
    entries = sorted([*folder.glob("*"), *(folder / NAMED_FOLDER).glob("*")])
    found = [path for path in entries if any(map(path.match, patterns))]
    # A model may have a folder of licences.
    found = [path for path in found if not (path.is_dir() and any(map(path.match, _LICENCES)))]
    files = [(path, own_file(folder, path.relative_to(folder))) for path in found]
    for path, own in files:
        try:
            check_plain(own, MAX_TOKENIZER_BYTES)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror}), expected a file of the model; replace or remove it"
            ) from None
    return files


def _with_dtype(hf_config: Mapping[str, Any], files: Mapping[str, Mapping[str, TensorSpec]]) -> dict[str, Any]:
    """`hf_config` without foreign code, naming the dtype of `files` where they have but one."""
    config = without_code(dict(hf_config))
    dtypes = {spec.dtype for specs in files.values() for spec in specs.values()}
    if len(dtypes) == 1:
        name = str(dtypes.pop()).removeprefix("torch.")
        config.update({key: name for key in ("dtype", "torch_dtype") if key in config} or {"torch_dtype": name})
    return config


def write_config(folder: Path, hf_config: Mapping[str, Any]) -> None:
    """Write a model's config.json into `folder`, without foreign code."""
    write_json(folder / "config.json", without_code(dict(hf_config)))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON that people can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
