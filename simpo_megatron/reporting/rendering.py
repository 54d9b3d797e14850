"""Text from the jinja2 templates of this folder. Values are escaped in pages, and not in Markdown."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def render(template: str, **values: object) -> str:
    """The text of `template`, the name of a file in templates/, with `values`.

    Raises: jinja2.UndefinedError when the template asks for a value that was not given.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("simpo_megatron.reporting"),
        autoescape=select_autoescape(disabled_extensions=("md",), default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
