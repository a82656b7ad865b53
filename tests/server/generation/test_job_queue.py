"""The queue alone: slots, order, deadlines and cancellation, under any sequence of events."""

import asyncio
import threading
import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engines.types import Job, RawImage
from server.generation.job_queue import JobQueue, QueuedJob

FAR = time.monotonic() + 1e6


def encode(image: RawImage) -> bytes:
    return image.pixels.tobytes()


def entry(width: int = 32, deadline: float = FAR) -> QueuedJob:
    future: asyncio.Future[Any] = asyncio.Future(loop=LOOP)
    return QueuedJob(Job("x", seed=0, width=width, height=32), encode, future, deadline)


class _NoLoop(asyncio.AbstractEventLoop):
    def get_debug(self) -> bool:
        return False


LOOP = _NoLoop()


def test_slots_are_taken_all_or_none_and_come_back() -> None:
    queue = JobQueue(max_waiting=4, max_in_flight=6)
    assert queue.reserve(3)
    assert not queue.reserve(2)
    assert queue.reserve(1)
    entries = [entry() for _ in range(3)]
    queue.put(entries)
    assert (queue.waiting, queue.in_flight) == (4, 4)
    assert queue.take(lambda _: 8) == (entries, [])
    assert (queue.waiting, queue.in_flight) == (1, 4)
    assert queue.reserve(2)
    assert not queue.reserve(1)  # three are not answered yet, and all in all six may be inside
    queue.release(unused=0, jobs=3)
    assert queue.reserve(1)


def test_expired_jobs_are_told_apart_and_do_not_take_room() -> None:
    queue = JobQueue(max_waiting=9, max_in_flight=9)
    assert queue.reserve(4)
    late, first, second = entry(deadline=time.monotonic() - 1), entry(), entry()
    queue.put([late, first, second])
    assert queue.take(lambda _: 2) == ([first, second], [late])


def test_take_waits_for_a_job_and_ends_with_the_queue() -> None:
    queue = JobQueue(max_waiting=9, max_in_flight=9)
    taken: list[Any] = []

    def work() -> None:
        while (batch := queue.take(lambda _: 8)) is not None:
            taken.append(batch)

    thread = threading.Thread(target=work)
    thread.start()
    queue.reserve(1)
    one = entry()
    queue.put([one])
    queue.close()
    thread.join(30)
    assert not thread.is_alive()
    assert taken == [([one], [])]


events = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from([32, 64, 96])),
        st.tuples(st.just("take"), st.integers(1, 4)),
        st.tuples(st.just("withdraw"), st.integers(0, 40)),
    ),
    max_size=60,
)


@given(events)
def test_oldest_first_whatever_happens(sequence: list[tuple[str, int]]) -> None:
    queue = JobQueue(max_waiting=1000, max_in_flight=1000)
    model: list[QueuedJob] = []  # what waits, oldest first
    everything: list[QueuedJob] = []
    for event, value in sequence:
        if event == "put":
            queue.reserve(1)
            model.append(entry(value))
            everything.append(model[-1])
            queue.put([model[-1]])
        elif event == "take" and model:
            expected = [one for one in model if one.job.key == model[0].job.key][:value]
            assert queue.take(dict.fromkeys((one.job.key for one in model), value).__getitem__) == (expected, [])
            model = [one for one in model if one not in expected]
        elif event == "withdraw" and everything:
            one = everything[value % len(everything)]
            assert queue.cancel(one) == (one in model)
            model = [other for other in model if other is not one]
        assert queue.waiting == len(model)
    assert {one.sequence for one in queue.clear()} == {one.sequence for one in model}
    assert queue.waiting == 0
