"""Answers prompts of token ids with vLLM, under a Python that has vLLM and need not have this package.

`vllm_child.py REPLIES ENGINE_ARGS`: REPLIES is the number of an open file, ENGINE_ARGS a JSON object for vLLM's
EngineArgs. Each line of stdin is a request, `{"id", "prompt_token_ids", "sampling"}`, the last a keyword for each field
of SamplingParams. REPLIES gets a first line with vLLM's version, then one for each request, in the order they end:
`{"id", "token_ids", "finish_reason"}`, or `{"id", "error"}`. It ends with its stdin.
"""

import json
import queue
import sys
import threading
from typing import IO, Any


def main(replies: int, engine_args: dict) -> None:
    """Answers until stdin has ended and every request has its answer."""
    # Imported here, so that importing every module of the package needs no vLLM.
    import vllm
    from vllm import EngineArgs, LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**engine_args))
    requests: queue.Queue = queue.Queue()
    threading.Thread(target=read_requests, args=(requests,), daemon=True).start()
    with open(replies, "w", encoding="utf-8") as file:
        say(file, {"version": vllm.__version__})
        is_open = True
        while is_open or engine.has_unfinished_requests():
            is_open = take(requests, engine, file, waits=not engine.has_unfinished_requests()) and is_open
            for output in engine.step() if engine.has_unfinished_requests() else ():
                if output.finished:
                    done = output.outputs[0]
                    ids = list(done.token_ids)
                    say(file, {"id": output.request_id, "token_ids": ids, "finish_reason": done.finish_reason})


def take(requests: queue.Queue, engine: Any, file: IO[str], *, waits: bool) -> bool:
    """Gives the engine the requests that have come, and waits for one when it is idle; False once stdin has ended."""
    from vllm import SamplingParams

    while True:
        try:
            request = requests.get(block=waits)
        except queue.Empty:
            return True
        if request is None:
            return False
        waits = False
        try:
            engine.add_request(
                request["id"],
                {"prompt_token_ids": request["prompt_token_ids"]},
                SamplingParams(**request["sampling"]),
            )
        except ValueError as error:
            say(file, {"id": request["id"], "error": str(error)})


def read_requests(requests: queue.Queue) -> None:
    """Puts each line of stdin into the queue, and None after the last."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    requests.put(None)


def say(file: IO[str], reply: dict) -> None:
    """Writes one line and flushes it."""
    file.write(json.dumps(reply) + "\n")
    file.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
