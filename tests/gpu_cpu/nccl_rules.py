"""Plays what ranks ask of NCCL, in the order they ask it: does a circle of waits form, and what meets what?

A communicator runs its calls in the order of issue on a stream of its own. Each call waits for what the compute stream
waits for at that time. A batch of messages is one call of its group's communicator; a message alone has a communicator
of its two ranks, unless communicators are made eagerly. A send ends with its receive. The first use of a
communicator that is not there makes it: the host blocks until every member came. `Work.wait` orders the compute stream
alone; a synchronize blocks the host until every call is done, a read until the compute stream has caught up.

A rank's program is fixed, and what meets is first in, first out. So the order in which ranks get on does not matter:
each ends in the same state.

Source: torch's ProcessGroupNCCL.cpp (pointToPoint, collective, workEnqueue) and NCCL's user guide on concurrency.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

Communicator = tuple[str, tuple[int, ...]]


@dataclass(eq=False)
class Message:
    """A send to, or a receive from, `peer`."""

    is_send: bool
    peer: int
    num_bytes: int
    place: int = 0
    """Its number among those of its rank."""
    is_matched: bool = False


@dataclass(eq=False)
class Call:
    """One operation that a rank asks of a communicator: a collective, or messages."""

    rank: int
    group: str
    members: tuple[int, ...]
    """Ranks of the group."""
    kind: str
    """A collective's name, `message`, or `batch` of messages."""
    num_bytes: int = 0
    messages: list[Message] = field(default_factory=list)
    where: str = ""
    is_started: bool = False
    is_done: bool = False
    num_waited_before: int = 0
    """So much the compute stream had been told to wait for when this was issued."""
    number: int = 0
    """Among the calls that this rank issued."""

    def communicator(self, rules: Rules) -> Communicator:
        if self.kind == "message" and not rules.eager:
            return f"{self.group}, two", tuple(sorted((self.rank, self.messages[0].peer)))
        return self.group, self.members

    def __str__(self) -> str:
        parts = [f"{'to' if m.is_send else 'from'} {m.peer} ({m.num_bytes} B)" for m in self.messages]
        what = f"{self.kind} {' and '.join(parts)}" if parts else f"{self.kind} of {self.num_bytes} B"
        return f"rank {self.rank}: {what} in {self.group} [{self.where}]"


@dataclass(frozen=True)
class Wait:
    """`Work.wait` of a call."""

    call: Call


@dataclass(frozen=True)
class Synchronize:
    """The host waits for the whole device."""

    where: str = ""


@dataclass(frozen=True)
class Read:
    """The host reads a tensor, and waits for the compute stream."""

    where: str = ""


Program = list[Call | Wait | Synchronize | Read]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The optional rules that hold."""

    eager: bool = False
    """`init_process_group(device_id=...)`: communicators are there from the start, and messages run on the group's."""
    one_queue: bool = False
    """CUDA_DEVICE_MAX_CONNECTIONS=1: nothing is dispatched before what was issued earlier."""
    connects: bool = False
    """The first message of a communicator from one rank to another blocks both hosts until both came."""
    idle_to_make: bool = False
    """A communicator is made when the devices of all its members are idle."""


STRICTEST = [Rules(eager=eager, one_queue=True, connects=True, idle_to_make=True) for eager in (False, True)]


class _Rank:
    """The progress of one rank's host and of its device's streams."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.at = 0
        self.issued: list[Call] = []
        self.streams: dict[Communicator, deque[Call]] = defaultdict(deque)
        self.waited: list[Call] = []
        self.caught_up = self.dispatched = self.num_done = 0

    @property
    def is_idle(self) -> bool:
        return self.num_done == len(self.issued)


class Play:
    """The outcome of `programs`, by rank: `stuck` lines of ranks that wait for ever, and the calls that met."""

    def __init__(self, programs: dict[int, Program], rules: Rules) -> None:
        self.rules = rules
        self.ranks = {rank: _Rank(program) for rank, program in programs.items()}
        self.unequal: list[str] = []
        """Collectives that met others, and messages received in another size."""
        self.matches: set[tuple[str, int, int, int, int]] = set()
        """(group, from, to, place of the send, place of the receive)."""
        self._came: dict[Communicator, set[int]] = defaultdict(set)
        self._made: set[Communicator] = set()
        self._connected: set[tuple] = set()
        self._meetings: dict[tuple[Communicator, int], list[Call]] = defaultdict(list)
        self._num_collectives: dict[tuple[Communicator, int], int] = defaultdict(int)
        self._open: dict[tuple[Communicator, int, int, bool], deque[tuple[Call, Message]]] = defaultdict(deque)
        moved = True
        while moved:
            moved, num_met = False, self._num_met()
            for rank, state in self.ranks.items():
                while self._host(rank, state):
                    moved = True
                moved |= self._device(rank, state)
            moved |= self._num_met() > num_met
        self.stuck = list(self._waiting())

    def _num_met(self) -> int:
        """Grows whenever a host that waits has made it possible for another to go on."""
        return len(self._connected) + len(self._made) + sum(map(len, self._came.values()))

    def _host(self, rank: int, state: _Rank) -> bool:
        """True when the host of `rank` took its next instruction."""
        if state.at == len(state.program) or self._blocked(rank, state) is not None:
            return False
        instruction = state.program[state.at]
        state.at += 1
        if isinstance(instruction, Wait):
            state.waited.append(instruction.call)
        elif isinstance(instruction, Call):
            instruction.num_waited_before, instruction.number = len(state.waited), len(state.issued)
            state.issued.append(instruction)
            state.streams[instruction.communicator(self.rules)].append(instruction)
        return True

    def _blocked(self, rank: int, state: _Rank) -> str | None:
        """The reason why the host of `rank` cannot continue; None when it can."""
        instruction = state.program[state.at]
        if isinstance(instruction, Wait):
            return None
        if isinstance(instruction, Synchronize):
            return None if state.is_idle else f"synchronize at {instruction.where}"
        if isinstance(instruction, Read):
            return None if state.caught_up == len(state.waited) else f"read at {instruction.where}"
        return self._not_made(rank, instruction) or self._not_connected(rank, instruction)

    def _not_made(self, rank: int, call: Call) -> str | None:
        communicator = call.communicator(self.rules)
        _, members = communicator
        if self.rules.eager or communicator in self._made:
            return None
        self._came[communicator].add(rank)
        if missing := set(members) - self._came[communicator]:
            return f"{call}: its communicator waits for ranks {sorted(missing)}"
        busy = [member for member in members if not self.ranks[member].is_idle]
        if self.rules.idle_to_make and busy:
            return f"{call}: its communicator waits for idle devices of ranks {busy}"
        self._made.add(communicator)
        return None

    def _not_connected(self, rank: int, call: Call) -> str | None:
        if not self.rules.connects:
            return None
        communicator = call.communicator(self.rules)
        missing = set()
        for message in call.messages:
            ends = (rank, message.peer) if message.is_send else (message.peer, rank)
            self._connected.add((communicator, ends, message.is_send))
            if (communicator, ends, not message.is_send) not in self._connected:
                missing.add(message.peer)
        return f"{call}: connects to ranks {sorted(missing)}" if missing else None

    def _device(self, rank: int, state: _Rank) -> bool:
        """True when anything moved on the streams of `rank`."""
        moved = False
        while state.caught_up < len(state.waited) and state.waited[state.caught_up].is_done:
            state.caught_up += 1
            moved = True
        while state.dispatched < len(state.issued) and state.issued[state.dispatched].is_started:
            state.dispatched += 1
        for communicator, stream in state.streams.items():
            while stream and stream[0].is_done:
                stream.popleft()
                moved = True
            if not stream or stream[0].is_started or state.caught_up < stream[0].num_waited_before:
                continue
            if self.rules.one_queue and stream[0].number != state.dispatched:
                continue
            self._start(stream[0], communicator)
            moved = True
        return moved

    def _start(self, call: Call, communicator: Communicator) -> None:
        call.is_started = True
        if not call.messages:
            self._meet(call, communicator)
            return
        for message in call.messages:
            ends = (call.rank, message.peer) if message.is_send else (message.peer, call.rank)
            others = self._open[(communicator, *ends, not message.is_send)]
            if not others:
                self._open[(communicator, *ends, message.is_send)].append((call, message))
                continue
            other_call, other = others.popleft()
            sent, received = (message, other) if message.is_send else (other, message)
            self.matches.add((call.group, *ends, sent.place, received.place))
            if sent.num_bytes != received.num_bytes:
                self.unequal.append(f"sent and received: {call} | {other_call}")
            sent.is_matched = received.is_matched = True
            self._settle(other_call)
        self._settle(call)

    def _meet(self, call: Call, communicator: Communicator) -> None:
        key = communicator, call.rank
        meeting = self._meetings[communicator, self._num_collectives[key]]
        self._num_collectives[key] += 1
        meeting.append(call)
        if len(meeting) < len(call.members):
            return
        if len({(other.kind, other.num_bytes) for other in meeting}) > 1:
            self.unequal.append("collectives: " + " | ".join(map(str, meeting)))
        for other in meeting:
            self._finish(other)

    def _settle(self, call: Call) -> None:
        if not call.is_done and all(message.is_matched for message in call.messages):
            self._finish(call)

    def _finish(self, call: Call) -> None:
        call.is_done = True
        self.ranks[call.rank].num_done += 1

    def _waiting(self):
        for rank, state in self.ranks.items():
            if state.at < len(state.program):
                yield f"host of rank {rank} at {state.at} of {len(state.program)}: {self._blocked(rank, state)}"
            for stream in state.streams.values():
                if stream and not stream[0].is_done:
                    yield f"{'runs' if stream[0].is_started else 'queued'}: {stream[0]}; {len(stream) - 1} behind it"


def in_order_of_issue(programs: dict[int, Program]) -> set[tuple[str, int, int, int, int]]:
    """The matches of messages as megatron means them: first sent, first received, within a group and a direction.

    NCCL matches within a communicator, of which a batch and a message alone have different ones.
    """
    places: dict[tuple[str, int, int, bool], list[int]] = defaultdict(list)
    for rank, program in programs.items():
        for call in program:
            for message in call.messages if isinstance(call, Call) else ():
                ends = (rank, message.peer) if message.is_send else (message.peer, rank)
                places[(call.group, *ends, message.is_send)].append(message.place)
    return {
        (group, source, target, sent, received)
        for group, source, target, is_send in places
        if is_send
        for sent, received in zip(places[group, source, target, True], places[group, source, target, False])
    }


def faults(programs: dict[int, Program], rules: Rules) -> list[str]:
    """The faults, in words; none when every rank ends with the data that was meant for it."""
    for program in programs.values():
        for call in program:
            if isinstance(call, Call):
                call.is_started = call.is_done = False
                for message in call.messages:
                    message.is_matched = False
    play = Play(programs, rules)
    crossed = play.matches - in_order_of_issue(programs)
    return [f"hangs: {line}" for line in play.stuck] + play.unequal + [f"crossed: {match}" for match in crossed]
