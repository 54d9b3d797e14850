"""Foreign programs end, chat templates and interpolations of YAML: by time, by memory and by what they write."""

import json
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from data_tokenizers import llama_like

from simpo_megatron.data import PairOptions, build_preference_dataset
from simpo_megatron.data.rendering import templates
from simpo_megatron.errors import DataError, status_line
from simpo_megatron.limits import LimitError, limited

MIB = 1 << 20
STATE = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_DATA)


def turn():
    while True:
        pass


def multiply():
    return 7 ** (10**8)


@pytest.mark.parametrize("work", [turn, multiply])
def test_what_takes_too_long_is_ended_also_inside_one_operation(work):
    started = time.process_time()
    with pytest.raises(LimitError), limited(cpu_seconds=0.2, num_bytes=100 * MIB):
        work()
    assert time.process_time() - started < 5
    assert (signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_DATA)) == STATE
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_what_takes_too_much_memory_is_ended_and_the_rest_goes_on():
    with pytest.raises(MemoryError), limited(cpu_seconds=10, num_bytes=100 * MIB):
        "a" * (200 * MIB)
    assert resource.getrlimit(resource.RLIMIT_DATA) == STATE[1]
    with limited(cpu_seconds=10, num_bytes=400 * MIB):
        assert len("a" * (200 * MIB)) == 200 * MIB


def test_one_within_another_has_its_own_time_and_the_others_memory():
    with limited(cpu_seconds=10, num_bytes=100 * MIB):
        limit = resource.getrlimit(resource.RLIMIT_DATA)
        with pytest.raises(LimitError), limited(cpu_seconds=0.1, num_bytes=100 * MIB):
            turn()
        assert resource.getrlimit(resource.RLIMIT_DATA) == limit != STATE[1]
        with pytest.raises(LimitError), limited(cpu_seconds=0.1, num_bytes=100 * MIB):
            turn()
    assert (signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_DATA)) == STATE


def test_waiting_costs_nothing():
    with limited(cpu_seconds=0.05, num_bytes=MIB):
        time.sleep(0.2)


def in_a_thread(work):
    """Runs `work` in another thread, and returns its result or raises its error here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("time_of_one_within", [None, 0.1])
def test_what_takes_too_long_in_another_thread_is_ended_and_what_comes_next_goes_on(time_of_one_within):
    def work():
        with pytest.raises(LimitError), limited(cpu_seconds=0.1 if time_of_one_within is None else 60, num_bytes=MIB):
            if time_of_one_within is None:
                turn()
            with limited(cpu_seconds=time_of_one_within, num_bytes=MIB):
                turn()
        until = time.thread_time() + 0.3
        while time.thread_time() < until:  # an error that was asked for late would be raised here
            pass
        return "done"

    assert in_a_thread(work) == "done"


def test_what_takes_too_much_memory_in_another_thread_is_ended():
    def work():
        with pytest.raises(MemoryError), limited(cpu_seconds=60, num_bytes=20 * MIB):
            held = []
            while len(held) < 4000:
                held.append(bytearray(b"a" * MIB))
                time.sleep(0.001)

    in_a_thread(work)


TEMPLATES = {
    "a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop in a macro": "{% macro f() %}{% for i in range(99999) %}{{ f() if i < 0 }}{% endfor %}{% endmacro %}"
    "{% for i in range(99999) %}{{ f() }}{% endfor %}",
    "a power": "{{ 7 ** (10 ** 8) }}",
    "a power at run time": "{{ messages|length ** 0 * 7 ** (messages|length * 10 ** 8) }}",
    "a repeated text": "{{ 'a' * (messages|length * 10 ** 11) }}",
    "a doubled text": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a doubled list": "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "a wide format": "{{ '%99999999999d' % 1 }}",
    "a wide filter": "{{ 'a'|center(99999999999) }}",
    "a batch": "{{ [1]|batch(10 ** 9, 'x')|list }}",
    "much text": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
}  # fmt: skip


def build(tmp_path, template, **options):
    (tmp_path / "t.jinja").write_text(template)
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    settings = PairOptions(chat_template=str(tmp_path / "t.jinja"), **options)
    return build_preference_dataset([str(tmp_path / "pairs.jsonl")], llama_like(), settings, tmp_path / "cache")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_without_bounds_is_one_error_on_its_first_record(template, tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "_CPU_SECONDS", 0.3)
    monkeypatch.setattr(templates, "_MAX_BYTES", 200 * MIB)
    # Whether malformed records are skipped or not: each of a million would take as long.
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: (endless_template|template_refused): ") as error:
        build(tmp_path, template, bad_record="skip", max_bad_fraction=0.9)
    assert len(status_line("ERROR", error.value)) <= 500


@pytest.mark.parametrize("kind", ["a loop", "a doubled text"])
def test_a_template_is_bounded_in_another_thread(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "_CPU_SECONDS", 0.3)
    monkeypatch.setattr(templates, "_MAX_BYTES", 200 * MIB)
    with pytest.raises(DataError, match="endless_template"):
        in_a_thread(lambda: build(tmp_path, TEMPLATES[kind]))


FAILURES = {
    "a division": "{{ 1 / 0 }}",
    "a range": "{{ range(10 ** 9) }}",
    "a recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "an overflow": "{{ 2.0 ** 99999 }}",
    "an exception without a word": "{{ raise_exception('') }}",
    "an exception of many lines": "{{ raise_exception('a\n\x1b[2Jb' * 99) }}",
    "an attribute of a class": "{{ ''.__class__.__mro__ }}",
    "a missing function": "{{ nothing() }}",
    "a missing filter": "{{ messages | nothing }}",
    "another template": "{% include 'x' %}",
    "too many blocks": "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
    "deep brackets": "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "no Jinja": "{{ ",
}


@pytest.mark.parametrize("template", FAILURES.values(), ids=FAILURES)
def test_a_template_that_fails_is_one_error_of_data(template, tmp_path):
    with pytest.raises(DataError) as error:
        build(tmp_path, template)
    line = status_line("ERROR", error.value)
    assert line.isprintable() and len(line) <= 500
    assert "pairs.jsonl:1: template_refused: " in line or "chat_template: found" in line
