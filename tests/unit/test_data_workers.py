"""A worker that fails or is killed is named with the records it had, and no worker outlives its parent."""

import os
import pickle
import subprocess
import sys

import data_worker_jobs as jobs
import psutil
import pytest
from data_tokenizers import llama_like

from simpo_megatron.data import PairOptions, build_preference_dataset
from simpo_megatron.data.store import chunks
from simpo_megatron.data.store.workers import map_in_processes
from simpo_megatron.errors import DataError

pytestmark = pytest.mark.processes


def test_results_come_in_order_and_an_unforeseen_error_names_the_process_and_its_records():
    results = jobs.mapped(jobs.double_but_of_9)
    assert [next(results) for _ in range(9)] == list(range(0, 18, 2))
    with pytest.raises(
        DataError, match=r"^file:9 to 9: found one that worker process \d+ failed on \(ValueError: nine\), expected"
    ):
        next(results)


def test_a_killed_process_is_named_with_the_records_in_work():
    results, got = jobs.mapped(jobs.double_but_killed_by_9), []
    with pytest.raises(DataError) as raised:
        got += results
    first = len(got)
    message = str(raised.value)
    assert first <= 9 and message.startswith(f"file:{first} to ")
    assert f"to {min(19, first + 3)}: found that worker process " in message and "ended (SIGKILL) while it" in message


class NotForProcesses:
    """A tokenizer that ends the process it is sent to."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __reduce__(self):
        return os._exit, (3,)


def test_a_build_whose_workers_die_names_the_lines_of_the_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 100)
    tokenizer = NotForProcesses(llama_like())
    with pytest.raises(DataError, match=rf"^{path}:1 to \d+: found that worker process \d+ ended \(exit code 3\)"):
        build_preference_dataset([str(path)], tokenizer, PairOptions(), tmp_path / "cache", num_workers=2)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_worker_that_tokenises_does_without_torch(tmp_path):
    arguments = (pickle.dumps(llama_like()), "pairs.jsonl", PairOptions())
    found = map_in_processes(
        jobs.is_loaded,
        iter(["transformers", "torch"]),
        num_workers=1,
        prepare=chunks._start_worker,
        arguments=arguments,
        describe=jobs.describe,
    )
    assert list(found) == [True, False]


def test_a_tokenizer_is_the_same_without_torch_and_transformers_has_torch_again_behind_it(tmp_path):
    llama_like().save_pretrained(tmp_path)
    script = f"""
import sys
from simpo_megatron.data import PairOptions, load_tokenizer
from simpo_megatron.data.tokenization import tokenizer_identity, torch_left_out

with torch_left_out():
    without = tokenizer_identity(load_tokenizer({str(tmp_path)!r}), PairOptions())
print("torch" in sys.modules)
print(tokenizer_identity(load_tokenizer({str(tmp_path)!r}), PairOptions()) == without)
print("torch" in sys.modules)
with torch_left_out():
    from transformers.utils import is_torch_available
print(is_torch_available())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "True"]
    assert done.stderr == ""


def test_workers_end_with_a_parent_that_was_killed():
    code = "import data_worker_jobs as jobs; list(jobs.mapped(jobs.say_and_sleep))"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__':\n  {code}"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert parent.stdout.readline() == "asleep\n"
    processes = psutil.Process(parent.pid).children(recursive=True)
    assert len(processes) >= 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)
    for process in alive:
        process.kill()
    assert alive == []
