"""Chat templates of many shapes, in few words each, over the special tokens of data_tokenizers.qwen_like."""

_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def _each(body, end=_ASK):
    return "{% for m in messages %}" + body + "{% endfor %}" + end


_ANSWER_ALONE = "{{ m.content.split('</think>')[-1] }}"
_SPLIT = (
    "{% set said = m.content %}{% set thought = '' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set said = said.split('</think>')[-1].strip() %}{% endif %}"
)
SHAPES = {
    "plain": _each(_TURN),
    "trims": _each(_TURN.replace("m.content", "m.content | trim")),
    "collapses": _each(_TURN.replace("m.content", "m.content.split() | join(' ')")),
    "capitals": _each(_TURN.replace("m.content", "m.content | upper")),
    "thinks": _each(
        "{% if m.role == 'assistant' %}" + _SPLIT + "<|im_start|>assistant\n{% if loop.last %}<think>\n{{ thought }}\n"
        "</think>\n\n{% endif %}{{ said }}<|im_end|>\n{% else %}" + _TURN + "{% endif %}"
    ),
    "opens": _each(
        "{% if m.role == 'assistant' %}" + _SPLIT + "<|im_start|>assistant\n{% if loop.last %}<think>\n{{ thought }}\n"
        "</think>\n\n{% endif %}{{ said }}<|im_end|>\n{% else %}" + _TURN + "{% endif %}",
        _ASK.replace("assistant\n", "assistant\n<think>\n"),
    ),
    "strips": _each(
        "{% if m.role == 'assistant' %}<|im_start|>"
        + _ANSWER_ALONE
        + "<|im_end|>{% else %}{{ m.role }}: {{ m.content }}"
        "\n{% endif %}",
        "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}",
    ),
    "cuts": _each(
        "{% if m.role == 'assistant' %}"
        + _TURN.replace("{{ m.content }}", _ANSWER_ALONE)
        + "{% else %}"
        + _TURN
        + "{% endif %}"
    ),
    "channels": _each(
        "{% if m.role == 'assistant' %}" + _SPLIT + "{% if thought and loop.last %}<|im_start|>assistant analysis: "
        "{{ thought }}<|im_end|>{% endif %}<|im_start|>assistant final: {{ said }}"
        "{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}{% else %}<|im_start|>{{ m.role }}: {{ m.content }}"
        "<|im_end|>{% endif %}",
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
    ),
    "users only": _each("{% if m.role != 'system' %}" + _TURN + "{% endif %}"),
    "ends twice": _each(_TURN, _ASK.replace("{% endif %}", "{% else %}<|endoftext|>{% endif %}")),
    "alternates": _each(
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('') }}{% endif %}" + _TURN
    ),
}
"""Jinja by shape."""


_CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"


def with_tools(template):
    """The shape with tools in front, calls at the end of turns, and the reasoning that stands beside a text."""
    template = template.replace("<|im_end|>", _CALLS + "<|im_end|>")
    template = template.replace("{% set thought = '' %}", "{% set thought = m.reasoning_content or '' %}")
    return "{% for t in tools or [] %}<tool>{{ t | tojson }}</tool>{% endfor %}" + template
