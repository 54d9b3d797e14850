"""Frames of templates: what the template itself writes, where it provably does no more than to join contents."""

import pytest
from chat_templates import SHAPES, with_tools
from conversations import rows
from data_tokenizers import GEMMA_TEMPLATE, LLAMA_TEMPLATE, QWEN_TEMPLATE, qwen_like

from simpo_megatron.data import bounded_dict
from simpo_megatron.data.pair_options import PairOptions
from simpo_megatron.data.records import BadRecord, to_record
from simpo_megatron.data.rendering import bundled_templates, chat_template_of
from simpo_megatron.data.rendering.template_frames import TemplateFrames, joins_contents

# In the words of families: Llama 3 and 2, Zephyr.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token ~ content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = '<<SYS>>' ~ messages[0]['content'] ~ '<</SYS>>' %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{{ (system_message if loop.first else '') + message['content'].strip() }}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif "
    "message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt and 'tool_calls' not in message %}\n{{ '<|assistant|>' }}\n{% endif %}"
    "\n{% endfor %}"
)
JOINING = {name: SHAPES[name] for name in ("plain", "trims", "users only", "ends twice", "alternates")} | {
    "llama": LLAMA_TEMPLATE, "qwen": QWEN_TEMPLATE, "gemma": GEMMA_TEMPLATE, "llama3": LLAMA3, "llama2": LLAMA2,
    "zephyr": ZEPHYR, "tools": with_tools(SHAPES["trims"]).replace("[]", "()"),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINING)
def test_a_frame_holds_what_the_template_writes(name):
    template = chat_template_of(qwen_like(), PairOptions(chat_template=JOINING[name]))
    frames, num_framed = TemplateFrames(template), 0
    for row in rows(120, seed=7):
        try:
            record = to_record(row, PairOptions(responses="assistant"))
        except BadRecord:
            continue
        for asks in (True, False):
            framed = frames.render(record.prompt, add_generation_prompt=asks)
            if framed is not None:
                assert framed == template.render(record.prompt, add_generation_prompt=asks)
                num_framed += 1
    assert num_framed > 50


@pytest.mark.parametrize("name", sorted(set(SHAPES) - set(JOINING)))
def test_a_template_that_reads_contents_has_no_frame(name):
    assert not joins_contents(SHAPES[name])


def test_bundled_templates_have_no_frame_as_they_look_at_system_turns():
    assert not any(joins_contents(path.read_text()) for path in bundled_templates().values())


@pytest.mark.parametrize(
    "body",
    [
        "{% if m.content %}x{% endif %}",
        "{% if m.content == 'a' %}x{% endif %}",
        "{% if 'a' in m.content %}x{% endif %}",
        "{% if m.content in ('a', 'b') %}x{% endif %}",
        "{{ m.content or 'b' }}",
        "{{ m.content | length }}",
        "{{ m.content[0] }}",
        "{{ m.content.upper() }}",
        "{{ m.content.strip('a') }}",
        "{{ m.content | trim('a') }}",
        "{{ (m.content + ' ') | trim }}",
        "{{ m.content * 2 }}",
        "{{ '%s' % m.content }}",
        "{{ {m.content: 1} }}",
        "{{ m }}",
        "{{ m | tojson }}",
        "{{ m.items() | list }}",
        "{{ m['values']() | list }}",
        "{{ m[m.role] }}",
        "{% for letter in m.content %}x{% endfor %}",
        "{% for key in m %}{{ m[key] }}{% endfor %}",
        "{% set said = m.content %}{% if said %}x{% endif %}",
        "{% if said %}x{% endif %}{% set said = m.content %}",
        "{% set n = namespace(x='') %}{% set n.x = m.content %}{% if n.x %}x{% endif %}",
        "{% set said %}{{ m.content }}{% endset %}{{ said | length }}",
        "{% macro say(x) %}{{ x | upper }}{% endmacro %}{{ say(m.content) }}",
        "{% filter upper %}{{ m.content }}{% endfilter %}",
        "{% set l = loop %}{{ l.previtem.content | length }}",
        "{% if loop.previtem and loop.previtem.content == 'a' %}x{% endif %}",
        "{% if loop.changed(m.content) %}x{% endif %}",
        "{{ messages }}",
        "{{ messages | map(attribute='content') | list | length }}",
        "{{ (messages | last).content | wordcount }}",
        "{% set all = messages + [m] %}{{ all[0].content }}",
        "{{ [m.content] | join }}",
        "{{ raise_exception(m.content) }}",
        "{{ [1, 2] | random }}",
        "{% generation %}{{ m.content }}{% endgeneration %}",
    ],
)
def test_each_use_of_a_content_but_writing_it_is_seen(body):
    assert joins_contents("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert not joins_contents("{% for m in messages %}" + body + "{% endfor %}")


def test_turns_that_are_more_than_text_have_no_frame():
    frames = TemplateFrames(chat_template_of(qwen_like(), PairOptions(chat_template=SHAPES["plain"])))
    turn = {"role": "user", "content": "a"}
    assert frames.render([turn], add_generation_prompt=False) == "<|im_start|>user\na<|im_end|>\n"
    assert frames.render([turn | {"name": "b"}], add_generation_prompt=False) is None


def test_a_dict_that_is_full_forgets_what_it_holds(monkeypatch):
    monkeypatch.setattr(bounded_dict, "MAX_KEPT", 2)
    kept = bounded_dict.BoundedDict()
    for number in range(5):
        kept[number] = -number
        assert kept[number] == -number and len(kept) <= 2
    assert kept == {4: -4}
