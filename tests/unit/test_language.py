"""Plain words, as far as a test can hold them: docstrings that begin with what they say, and short help texts."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import simpo_megatron
from simpo_megatron.config.options import option_table

ROOT = Path(__file__).parents[2]
MAX_WORDS = 25


def _sources() -> list[Path]:
    """Every Python file of the package, its tests, tools and examples, but for this one, which names what it bans."""
    folders = (Path(simpo_megatron.__file__).parent, *(ROOT / name for name in ("tests", "tools", "examples")))
    return [path for folder in folders for path in sorted(folder.rglob("*.py")) if path.name != Path(__file__).name]


def _place(path: Path, line: int) -> str:
    return f"{'/'.join(path.parts[-3:])}:{line}"


# A docstring's first line says what is returned or done; a question's first word says neither.
QUESTION = re.compile(r"(What|Of|How|Whether|Nothing|Who|Which|Where|Why|As)\b")

# Words that only the house spoke, and the field's words for them.
HOUSE_WORDS = {
    r"held[- ]out pairs": "validation pairs",
    r"number format": "dtype",
    r"\bmixtures?\b(?! of data)": "MoE",
    r"way to meet": "connect to",
    r"float64 twin": "float64 reference",
    r"\bits likes\b": "its peers",
    r"computed again": "recomputed",
}


def _docstrings() -> list[tuple[str, str]]:
    found = []
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if is_documented and (text := ast.get_docstring(node)):
                found.append((_place(path, getattr(node, "lineno", 1)), text))
            for before, after in pairwise(getattr(node, "body", ()) if is_documented else ()):
                # A field or a constant, and the text below it.
                match before, after:
                    case ast.Assign() | ast.AnnAssign(), ast.Expr(ast.Constant(str(text))):
                        found.append((_place(path, after.lineno), text))
    return found


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?:;])\s+", text)


def test_no_docstring_begins_with_a_question() -> None:
    docstrings = _docstrings()
    assert len(docstrings) > 2000
    odd = [f"{where}: {text.splitlines()[0]}" for where, text in docstrings if QUESTION.match(text)]
    assert not odd, "\n".join(odd)


def test_the_field_s_words_are_used() -> None:
    odd = [
        f"{_place(path, number)}: {line.strip()}; say {better!r}"
        for path in _sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for pattern, better in HOUSE_WORDS.items()
        if re.search(pattern, line, re.IGNORECASE)
    ]
    assert not odd, "\n".join(odd)


def test_sentences_of_help_texts_are_short() -> None:
    odd = [
        f"{name}: {len(sentence.split())} words: {sentence}"
        for name, option in option_table().items()
        for sentence in _sentences(option.help)
        if len(sentence.split()) > MAX_WORDS
    ]
    assert not odd, "\n".join(odd)


def _prose(page: str) -> list[str]:
    """The paragraphs and items of a page, without code, tables and the addresses of links."""
    text = re.sub(r"```.*?```|<!--.*?-->|^\|.*?$", "", page, flags=re.S | re.M)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "X", text))
    return re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", text)


def test_sentences_of_the_pages_that_users_read_are_short() -> None:
    pages = [
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        *sorted((ROOT / "docs").glob("[!r]*/*.md")),
        ROOT / "docs" / "index.md",
    ]
    assert len(pages) > 25
    odd = [
        f"{page.relative_to(ROOT)}: {len(words)} words: {' '.join(words)}"
        for page in pages
        for paragraph in _prose(page.read_text(encoding="utf-8"))
        for sentence in _sentences(paragraph)
        if len(words := sentence.split()) > MAX_WORDS
    ]
    assert not odd, "\n".join(odd)
