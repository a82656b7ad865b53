"""Events of a request, in order."""

from dataclasses import dataclass

from bench.roofline.op_counter import Call


@dataclass(frozen=True, slots=True)
class Launch:
    """A call on the card, made of `kernels` launches; 0 if it is part of the launch before."""

    call: Call
    kernels: int = 1


@dataclass(frozen=True, slots=True)
class Replay:
    """One launch of a captured graph."""

    launches: tuple[Launch, ...]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A copy between host and card. The host waits for one of pageable memory, without a Wait beside it."""

    bytes: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class Wait:
    """The host waits for the card."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The engine's timer records an event."""


Event = Launch | Replay | Transfer | Wait | Mark
