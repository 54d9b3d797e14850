"""vLLM's answers from a model folder; runs under a Python with vLLM, which need not have this package.

`vllm_worker.py FOLDER JOB`: JOB is a JSON file of `questions`, `max_tokens` and `forced`, ids that the answer to the
first question is made to begin with, one after the other. FOLDER is served as it is, in fp32, greedily. Leaves in JOB
an object for each answer: its prompt's ids, its own, why it ended, and at which stop id if not the tokenizer's own.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(folder: str, job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    # Small enough for any machine; vLLM takes half of the memory if not told.
    model = LLM(folder, dtype="float32", max_model_len=256, enforce_eager=True, kv_cache_memory_bytes=64 << 20)
    greedy = {"temperature": 0.0, "max_tokens": job["max_tokens"]}
    questions = job["questions"] + job["questions"][:1] * len(job["forced"])
    sampling = [SamplingParams(**greedy) for _ in job["questions"]]
    sampling += [SamplingParams(**greedy, logit_bias={token: 100.0}) for token in job["forced"]]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    answers = [
        {
            "prompt": list(request.prompt_token_ids),
            "ids": list(request.outputs[0].token_ids),
            "ended": request.outputs[0].finish_reason,
            "stop": request.outputs[0].stop_reason,
        }
        for request in model.chat(conversations, sampling, use_tqdm=False)
    ]
    job_file.write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
