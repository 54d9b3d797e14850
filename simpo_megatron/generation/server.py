"""A client of OpenAI's chat protocol, for answers and judgements."""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from simpo_megatron.errors import ConfigError, DataError
from simpo_megatron.generation.prompts import Message

API_KEY = "OPENAI_API_KEY"
_TRIES, _FIRST_PAUSE_SECONDS, _TIMEOUT_SECONDS = 5, 1.0, 600.0
_WORTH_ANOTHER_TRY = (408, 409, 429, 500, 502, 503, 504)
_MAX_SHOWN = 200
_GATEWAY_ERRORS = (502, 503, 504)
_LOOK_SECONDS = 10.0
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """A server's answer."""

    text: str
    num_tokens: int
    finish_reason: str | None


@dataclass(frozen=True)
class ChatServer:
    """A model behind `URL/chat/completions`; the key comes from OPENAI_API_KEY and is never stored."""

    url: str
    model: str
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """The failures that were told, each once however many requests meet it."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url: found {self.url[:60]!r}, expected http:// or https://, as in http://host:8000/v1")

    def chat(self, messages: Sequence[Message], *, max_tokens: int, temperature: float, seed: int) -> Reply:
        """The answer to a conversation.

        Raises:
            ConfigError: the server refuses the request.
            DataError: it does not answer in five tries, or not with a chat completion.
        """
        found = self._post({**self._asked(messages, max_tokens), "temperature": temperature, "seed": seed})
        try:
            choice = found["choices"][0]
            text = choice["message"]["content"] or ""
            num_tokens = int((found.get("usage") or {}).get("completion_tokens", 0))
            return Reply(text, num_tokens, choice.get("finish_reason"))
        except (KeyError, IndexError, TypeError, ValueError):
            shown = json.dumps(found)[:_MAX_SHOWN]
            raise DataError(f"{self.url}: found {shown}, expected a chat completion") from None

    def top_logprobs(self, messages: Sequence[Message], num: int) -> int:
        """The number of top logprobs that the server returns for a first token when `num` are asked for.

        Raises: ConfigError, DataError, as `chat` does; ConfigError also where it refuses to return any.
        """
        found = self._post({**self._asked(messages, 1), "temperature": 1.0, "logprobs": True, "top_logprobs": num})
        try:
            return len(found["choices"][0]["logprobs"]["content"][0]["top_logprobs"])
        except (KeyError, IndexError, TypeError):
            return 0

    def failure(self) -> str | None:
        """The reason why nothing answers at the URL; None where something does, if only to say that it is busy."""
        try:
            with urllib.request.urlopen(f"{self.url.rstrip('/')}/models", timeout=_LOOK_SECONDS):  # noqa: S310
                return None
        except urllib.error.HTTPError as error:
            return str(error) if error.code in _GATEWAY_ERRORS else None
        except TimeoutError:
            # It was connected: a server that has one thread is at work on an answer.
            return None
        except (OSError, ValueError) as error:
            return str(getattr(error, "reason", error))

    def _asked(self, messages: Sequence[Message], max_tokens: int) -> dict[str, Any]:
        return {"model": self.model, "messages": [dict(turn) for turn in messages], "max_tokens": max_tokens}

    def _post(self, asked: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if API_KEY in os.environ:
            headers["Authorization"] = f"Bearer {os.environ[API_KEY]}"
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(asked).encode(), headers
        )
        said = ""
        for attempt in range(_TRIES):
            if attempt:
                self._tell(said)
                time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as reply:  # noqa: S310
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.read(_MAX_SHOWN).decode(errors='replace')}"
                if error.code not in _WORTH_ANOTHER_TRY:
                    raise ConfigError(f"{self.url}: found {said}, expected an answer of model {self.model}") from None
            except (OSError, ValueError) as error:
                said = str(getattr(error, "reason", error))
                if isinstance(error, TimeoutError):
                    # A server that takes so long would be asked the same five times, in silence.
                    raise DataError(
                        f"{self.url}: found no answer in {_TIMEOUT_SECONDS:.0f} s, expected one; look at the server, "
                        "or ask it less at once"
                    ) from None
        raise DataError(f"{self.url}: found {said} in {_TRIES} tries, expected an answer; start the server")

    def _tell(self, said: str) -> None:
        if said not in self._told:
            self._told.add(said)
            pauses = sum(_FIRST_PAUSE_SECONDS * 2**attempt for attempt in range(_TRIES - 1))
            _LOGGER.warning("%s: found %s; trying again for %.0f s", self.url, said, pauses)
