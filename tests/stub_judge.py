"""A server that speaks OpenAI's protocol and calls itself a stub in every reply: its verdicts follow from the text.

AlpacaEval's judge is asked for logprobs: `p(m)` is the logistic of how much longer the first output is. MT-Bench gets
1 to 10 by the length of what was asked; Arena-Hard prefers the longer answer. Anything else gets an answer.
"""

from __future__ import annotations

import json
import math
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = "stub-judge"
STUB = "STUB JUDGE, NOT A MODEL"
SCALE = 400


def preference(length: int, other: int) -> float:
    """The probability that an output of `length` characters is preferred to one of `other`."""
    return 1 / (1 + math.exp(-(length - other) / SCALE))


def rating(text: str) -> int:
    """MT-Bench's rating of a request."""
    return 1 + len(text) % 10


def label(length: int, other: int) -> str:
    """Arena-Hard's verdict on answers of these lengths."""
    longer = length - other
    if abs(longer) < 20:
        return "A=B"
    strongly = abs(longer) > SCALE
    return ("A>>B" if strongly else "A>B") if longer > 0 else ("B>>A" if strongly else "B>A")


class StubServer(ThreadingHTTPServer):
    """The server; `asked` holds every request, `gives_logprobs` and `label_is` spoil it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict] = []
        self.gives_logprobs, self.label_is = True, None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def reply(self, request: dict) -> tuple[str, dict | None]:
        """The text of an answer, and its logprobs."""
        text = "\n".join(str(turn["content"]) for turn in request["messages"])
        if request.get("logprobs"):
            if not self.gives_logprobs:
                return "m", None
            outputs = re.findall(r'"output": """(.*?)"""', text, re.S)
            share = preference(*map(len, outputs)) if len(outputs) == 2 else 0.5
            share = min(max(share, 1e-9), 1 - 1e-9)
            named = [(" ", 1e-12), ("n", 1e-12), ("M", 1 - share), ("m", share), ("k", 1e-12)]
            top = [{"token": token, "bytes": None, "logprob": math.log(p)} for token, p in named]
            token = "m" if share >= 0.5 else "M"
            return token, {"content": [{"token": token, "bytes": None, "logprob": -0.1, "top_logprobs": top}]}
        if "[[rating]]" in text:
            return f"{STUB}. Rating: [[{rating(text)}]]", None
        if "Start of Assistant A's Answer" in text:
            answers = [
                re.search(rf"Start of Assistant {side}'s Answer\|>\n(.*)\n<\|The End of Assistant {side}", text, re.S)[
                    1
                ]
                for side in "AB"
            ]
            return f"{STUB}. My final verdict is: [[{self.label_is or label(*map(len, answers))}]]", None
        return f"{STUB}, answer of {len(text)} characters", None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(request)
        text, logprobs = self.server.reply(request)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        reply = {
            "id": STUB,
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [{**choice, "logprobs": logprobs}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def stub_judge():
    """A `StubServer` that answers while the context lasts."""
    with StubServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
