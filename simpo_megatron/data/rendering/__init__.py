"""A conversation as the text that a model sees: chat templates, and proofs of where each turn of a rendering begins.

A pair is rendered whole, and split where its responses begin. A template that drops or rewrites part of a
conversation is noticed here. Bundled templates are in `chat_templates/`.
"""

from simpo_megatron.data.rendering.findings import FINDINGS, HARMLESS
from simpo_megatron.data.rendering.rendered_pairs import PairRenderer, RenderedPair
from simpo_megatron.data.rendering.rendered_turns import Spans
from simpo_megatron.data.rendering.templates import (
    EndlessTemplateError,
    bounds_of_templates,
    bundled_templates,
    chat_template_of,
    chosen_template,
    lacks_template,
    special_texts,
)

__all__ = [
    "FINDINGS",
    "HARMLESS",
    "EndlessTemplateError",
    "PairRenderer",
    "RenderedPair",
    "Spans",
    "bounds_of_templates",
    "bundled_templates",
    "chat_template_of",
    "chosen_template",
    "lacks_template",
    "special_texts",
]
