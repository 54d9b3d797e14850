"""Mutations of JSON files: values of other types and sizes, keys lost and doubled, bytes cut, turned and put in.

SIMPO_MUTATIONS=1000 tries as many of each file; SIMPO_SEED another sequence.
"""

import copy
import json
import os
import random
import re
import shutil
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import write_llama3

from simpo_megatron.errors import SimPOError, status_line
from simpo_megatron.limits import LimitError, limited

NUM_MUTATIONS = int(os.environ.get("SIMPO_MUTATIONS", 25))
SEED = int(os.environ.get("SIMPO_SEED", 1))

JUNK = (
    None, True, False, 0, -1, 1, 3, 0.5, -0.0, float("nan"), float("inf"), 1e308, 2**31, 2**63, 10**30, -(2**63),
    "", " ", "x", "1", "None", "../x", "/etc/passwd", "a\x1b[2J\nb", "\ud800", "x" * 5000,
    [], {}, [None], [[]], [1, "a", None], {"a": 1}, {"": {}}, [0] * 2000, dict.fromkeys(map(str, range(500))),
)  # fmt: skip


_LITERALS = (
    b"NaN", b"-Infinity", b"1e999", b"1e-400", b"-1", b"0x10", b"01", b"'a'", b"None", b"{", b"-" + b"9" * 30,
    b"9" * 400, b"[" * 100_000, b'{"a":' * 100_000, b"[" + b"0," * 300_000 + b"0]", b'"' + b"x" * 2_000_000 + b'"',
    b'"\\ud800"', b'"\xc3"', b'"\xed\xa0\x80"', b'"\x00"',
)  # fmt: skip
_SCALAR, _KEY = re.compile(rb'(?<=[:,\[] )(?:"[^"]*"|[-0-9.e]+|true|false|null)'), re.compile(rb'"[^"]+": ')


def try_mutations(
    name: str, mutate: Callable[[random.Random], Any], write: Callable[[Any], Any], read: Callable[[], Any]
) -> int:
    """Asserts that each mutation is read or refused, and returns how many were refused."""
    numbers = random.Random(zlib.crc32(name.encode()) + SEED)
    num_refused, problems = 0, []
    for number in range(NUM_MUTATIONS):
        content = mutate(numbers)
        write(content)
        try:
            with limited(cpu_seconds=20, num_bytes=2 << 30):
                read()
        except SimPOError as error:
            num_refused += 1
            line = status_line("ERROR", error)
            assert "\n" not in line and len(line) <= 500
        except (Exception, LimitError) as error:
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            problems.append(f"{name} {number}: {type(error).__name__}: {str(error)[:200]}: {text[:300]!r}")
    assert not problems, f"{len(problems)} of {NUM_MUTATIONS}:\n" + "\n".join(problems[:20])
    print(f"{name}: {num_refused} of {NUM_MUTATIONS} refused")
    return num_refused


def write_model(folder: Path) -> Path:
    """Writes a small Llama 3 into `folder`, to mutate its files; returns the folder."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    write_llama3(folder, hidden_size=64, intermediate_size=96, max_position_embeddings=256, **heads)
    return folder


def mutated_json(content: Any, numbers: random.Random) -> Any:
    """Returns a copy of `content` with one to three mutations of its values."""
    content = copy.deepcopy(content)
    for _ in range(numbers.randrange(1, 4)):
        holder, key = _place(content, numbers)
        if holder is None:
            return copy.deepcopy(numbers.choice(JUNK))
        action = numbers.randrange(5)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif action == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = numbers.choice(
                (-holder[key], holder[key] * 2, holder[key] + 1, holder[key] * 10**6, str(holder[key]))
            )
        elif action == 3:
            holder[key] = [holder[key]] if numbers.randrange(2) else {"a": holder[key]}
        else:
            holder[key] = copy.deepcopy(numbers.choice(JUNK))
    return content


def mutated_bytes(content: bytes, numbers: random.Random) -> bytes:
    """Returns `content` cut, with bytes turned, put in or repeated, or as other text."""
    at = numbers.randrange(len(content) + 1)
    return numbers.choice((
        content[:at],
        content[:at] + bytes([numbers.randrange(256)]) + content[at + 1 :],
        content[:at] + numbers.randbytes(numbers.randrange(1, 20)) + content[at:],
        content[:at] + b"[" * 3000 + content[at:],
        content[:at] + b"9" * 5000 + content[at:],
        content + content,
        content.decode("utf-8", "replace").encode("utf-16"),
        content[:at] + "é".encode()[:1],
        content[:at] + b"\xed\xa0\x80" + content[at:],
        b"\xef\xbb\xbf" + content,
        b"",
    ))  # fmt: skip


def mutated_text(content: bytes, numbers: random.Random) -> bytes:
    """Returns `content` with a literal that Python cannot write in place of a value, or with a key twice."""
    is_key = numbers.randrange(3) == 0
    places = list((_KEY if is_key else _SCALAR).finditer(content))
    if not places:
        return mutated_bytes(content, numbers)
    place, literal = numbers.choice(places), numbers.choice(_LITERALS)
    if is_key:
        return content[: place.start()] + place[0] + literal + b", " + content[place.start() :]
    return content[: place.start()] + literal + content[place.end() :]


def mutated_file(content: bytes, numbers: random.Random) -> bytes:
    """Returns one mutation of a JSON file, of its values three times out of five."""
    kind = numbers.randrange(5)
    if kind == 0:
        return mutated_bytes(content, numbers)
    if kind == 1:
        return mutated_text(content, numbers)
    return json.dumps(mutated_json(json.loads(content), numbers)).encode()


def _place(content: Any, numbers: random.Random) -> tuple[Any, Any]:
    """Returns a holder and a key of it, somewhere in `content`; (None, None) where it holds nothing."""
    holder, key = None, None
    while isinstance(content, dict | list) and content and (holder is None or numbers.randrange(3)):
        holder = content
        key = numbers.choice(sorted(content)) if isinstance(content, dict) else numbers.randrange(min(len(content), 50))
        content = holder[key]
    return holder, key


def odd_places(path: Path) -> dict[str, Callable[[], None]]:
    """Returns what puts something else than a file at `path`, by its name; reading some of it would never end."""

    def bind() -> None:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path may have a hundred characters
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path.name)
        finally:
            os.chdir(here)

    def extend() -> None:
        path.write_bytes(b"{")
        os.truncate(path, 1 << 40)

    return {
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a socket": bind,
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to nothing": lambda: path.symlink_to("nothing"),
        "a link to a device": lambda: path.symlink_to("/dev/zero"),
        "a terabyte": extend,
        "nothing in it": lambda: path.write_bytes(b""),
    }


def removed(path: Path) -> None:
    """Removes the file, folder or whatever is at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
