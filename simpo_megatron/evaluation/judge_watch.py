"""A watch on the judge's server while an official scorer asks it: that one tries again for minutes and says nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator

from simpo_megatron.errors import DataError
from simpo_megatron.generation.server import ChatServer

_MAX_SECONDS_AWAY = 60.0
_SECONDS_BETWEEN_LOOKS = 10.0


class JudgeWatch:
    """Tells when the server does not answer, and ends the wait for one that stays away."""

    def __init__(self, server: ChatServer) -> None:
        self._server = server
        self._looked = time.monotonic()
        self._away_since: float | None = None

    @property
    def is_away(self) -> bool:
        """True since a look that found no answer."""
        return self._away_since is not None

    def lines(self) -> Iterator[str]:
        """The line on a server that has gone or come back, at the looks that see it.

        Raises: DataError where it has been away for a minute.
        """
        now = time.monotonic()
        if now - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked, url = now, self._server.url
        failure = self._server.failure()
        if failure is None:
            if self.is_away:
                yield f"judge     {url} answers again"
            self._away_since = None
        elif self._away_since is None:
            self._away_since = now
            yield f"WARNING   {url} does not answer ({failure}); judging ends after {_MAX_SECONDS_AWAY:.0f} s of this"
        elif now - self._away_since >= _MAX_SECONDS_AWAY:
            raise self._no_answer(failure)

    def cause_of(self, error: DataError) -> DataError:
        """The error on the server where it does not answer, and else `error`, the official scorer's own."""
        failure = self._server.failure()
        return error if failure is None else self._no_answer(failure)

    def _no_answer(self, failure: str) -> DataError:
        return DataError(
            f"judge: found no answer of {self._server.url} ({failure}), expected verdicts; start the server, and run "
            "the same command again for those that are missing"
        )
