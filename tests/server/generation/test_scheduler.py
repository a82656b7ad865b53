"""Batches, order, engine failures, hang and drain, over HTTP, with a fake engine that a test can hold."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from running_server import (
    PATIENCE_S,
    GatedEngine,
    PendingResponse,
    Running,
    Serve,
    connect_and_send,
    image_file,
    read_image,
    wait_until,
)

from engines.errors import CheckpointError
from engines.fake import FakeEngine, FaultInjection, expected_pixels
from engines.types import Deliver, Engine, Job, RawImage
from server.errors import EXIT_ENGINE, EXIT_HANG, EXIT_START
from server.generation.engine_source import FixedEngineSource
from server.generation.image_codec import Codec
from server.generation.scheduler import Scheduler
from server.telemetry.metrics import Metrics


def queue_up(running: Running, engine: GatedEngine, prompts: list[str], **body: Any) -> list[PendingResponse]:
    """Sends a request that holds the engine, then queues one for each prompt in this order."""
    requests = [running.submit_generate("holds the engine", width=32, height=32)]
    engine.wait_for_batch()
    for i, prompt in enumerate(prompts):
        requests.append(running.submit_generate(prompt, **body))
        running.wait_for_queued(i + 1)
    return requests


def prompts_seen(engine: GatedEngine) -> list[list[str]]:
    return [[job.prompt for job in batch] for batch in engine.seen]


def test_what_waits_with_the_oldest_jobs_key_runs_as_one_batch(serve: Serve) -> None:
    engine = GatedEngine(max_batch=4)
    running = serve(engine, max_batch=4)
    requests = queue_up(running, engine, ["a", "b"])
    requests.append(running.submit_generate("wide", width=96))
    running.wait_for_queued(3)
    requests += [running.submit_generate(prompt) for prompt in "cde"]
    running.wait_for_queued(6)
    engine.gate.set()
    assert [one.result().status_code for one in requests] == [200] * 7
    first, second, third, fourth = prompts_seen(engine)
    assert first == ["holds the engine"]
    assert second[:2] == ["a", "b"]
    assert len(second) == 4
    assert third == ["wide"]  # older than what "a" left behind
    assert len(fourth) == 1
    assert sorted(second[2:] + fourth) == ["c", "d", "e"]


def test_images_of_a_batch_go_to_their_requests_and_padding_is_counted(serve: Serve) -> None:
    engine = GatedEngine()
    running = serve(engine)
    requests = queue_up(running, engine, [f"prompt {i}" for i in range(5)], seed=3)
    engine.gate.set()
    for i, request in enumerate(requests[1:]):
        expected = expected_pixels(Job(f"prompt {i}", seed=3, width=64, height=64))
        np.testing.assert_array_equal(read_image(request.result().content), expected)
    assert engine.batches == [1, 5]
    assert running.metric("sana_sprint_batch_size_sum") == 6
    assert running.metric("sana_sprint_batch_padding_total") == 3
    assert running.metric("sana_sprint_prompt_cache_misses_total") == 6


def test_many_clients_fill_the_batches(serve: Serve) -> None:
    class Patient(FakeEngine):
        """Ends a batch when the next one is full, or when no further request will come."""

        left = 160

        def generate(self, jobs: Sequence[Job], deliver: Deliver | None = None) -> list[RawImage]:
            self.left -= len(jobs)
            wait_until(lambda: running.waiting >= min(8, self.left), "the next batch")
            return super().generate(jobs, deliver)

    running = serve(Patient())

    def ask(i: int) -> None:
        answer = running.generate(f"prompt {i}", seed=i)
        assert answer.status_code == 200
        expected = expected_pixels(Job(f"prompt {i}", seed=i, width=64, height=64))
        np.testing.assert_array_equal(read_image(answer.content), expected)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(ask, range(160)))
    mean = running.metric("sana_sprint_batch_size_sum") / running.metric("sana_sprint_batch_size_count")
    assert mean > 7
    assert running.metric("sana_sprint_images_total", width="64", height="64", steps="1") == 160


def test_a_request_gets_all_its_slots_or_none(serve: Serve) -> None:
    engine = GatedEngine(max_batch=1)
    running = serve(engine, max_batch=1, max_queue=4)
    requests = queue_up(running, engine, ["a", "b"])
    assert running.generate(num_images=3).status_code == 429
    assert running.waiting == 2
    requests.append(running.submit_generate(num_images=2))
    running.wait_for_queued(4)
    engine.gate.set()
    assert [one.result().status_code for one in requests] == [200] * 4
    assert running.metric("sana_sprint_jobs_dropped_total", reason="queue_full") == 3


def test_a_slot_is_free_again_after_an_image_that_cannot_be_read(serve: Serve) -> None:
    running = serve(max_batch=1, max_queue=1)
    for _ in range(5):
        assert running.generate(image="aGVsbG8=").status_code == 422
    assert running.generate().status_code == 200


def test_a_job_that_always_fails_fails_alone(serve: Serve) -> None:
    engine = GatedEngine()
    running = serve(engine)
    requests = queue_up(running, engine, ["a", "b [[raise]]", "c", "d [[nan]]"])
    engine.gate.set()
    assert [one.result().status_code for one in requests] == [200, 200, 500, 200, 500]
    assert prompts_seen(engine)[2:] == [["a"], ["b [[raise]]"], ["c"], ["d [[nan]]"]]
    assert running.left == []


def test_a_transient_failure_is_hidden(serve: Serve) -> None:
    engine = GatedEngine(faults=FaultInjection(raise_on_calls=frozenset({1})))
    running = serve(engine)
    requests = queue_up(running, engine, ["a", "b"])
    engine.gate.set()
    assert [one.result().status_code for one in requests] == [200] * 3
    assert engine.batches == [1, 2, 1, 1]


def test_a_transient_failure_is_hidden_in_a_batch_of_one_too(serve: Serve) -> None:
    engine = FakeEngine()
    running = serve(engine)
    assert running.generate("x [[once]]").status_code == 200
    assert running.generate("x [[raise]]").status_code == 500
    assert engine.batches == [1, 1, 1, 1]


def test_out_of_memory_halves_the_batches_of_its_key_and_goes_on(serve: Serve) -> None:
    engine = GatedEngine(faults=FaultInjection(out_of_memory_above=2))
    running = serve(engine)
    requests = queue_up(running, engine, [f"prompt {i}" for i in range(7)])
    engine.gate.set()
    assert [one.result().status_code for one in requests] == [200] * 8
    assert engine.batches == [1, 7, 4, 2, 2, 2, 1]
    engine.gate.clear()
    requests = queue_up(running, engine, ["a", "b", "c", "d"])
    engine.gate.set()
    assert [one.result().status_code for one in requests] == [200] * 5
    assert engine.batches[7:] == [1, 2, 2]  # it remembers
    assert running.metric("sana_sprint_engine_failures_total", kind="out_of_memory") == 2


def test_a_job_too_large_even_alone_gets_500(serve: Serve) -> None:
    running = serve(FakeEngine(faults=FaultInjection(out_of_memory_above=0)))
    answer = running.generate()
    assert (answer.status_code, "no memory" in answer.json()["detail"]) == (500, True)


def test_an_engine_that_fails_on_its_own_job_too_is_left(serve: Serve) -> None:
    running = serve(FakeEngine(faults=FaultInjection(broken_from_call=1)))
    assert running.generate().status_code == 200
    assert [running.generate().status_code for _ in range(3)] == [500] * 3
    wait_until(lambda: running.left == [EXIT_ENGINE])
    assert running.client.get("/health/ready").status_code == 503
    assert running.generate().json()["code"] == "engine_lost"


def test_prompts_that_make_a_good_engine_fail_do_not_restart_it(serve: Serve) -> None:
    running = serve()
    assert [running.generate("[[raise]]").status_code for _ in range(7)] == [500] * 7
    assert running.generate().status_code == 200
    assert running.left == []


def test_a_hang_is_noticed_told_and_left(serve: Serve) -> None:
    engine = GatedEngine(max_batch=1)
    engine.gate.set()
    running = serve(engine, max_batch=1, batch_timeout_s=0.2)
    hanging = running.submit_generate("[[hang]]")
    engine.wait_for_batch()
    waiting = running.submit_generate("waits")
    answer = hanging.result()
    assert (answer.status_code, "longer than 0.2 s" in answer.json()["detail"]) == (500, True)
    assert (waiting.result().status_code, waiting.result().json()["code"]) == (503, "engine_hung")
    assert running.client.get("/health/ready").json()["code"] == "engine_hung"
    assert running.client.get("/health/live").status_code == 200
    wait_until(lambda: running.left == [EXIT_HANG])
    assert running.metric("sana_sprint_engine_failures_total", kind="hang") == 1


def test_an_engine_that_cannot_be_loaded_is_left_with_a_code(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    def load() -> Engine:
        raise CheckpointError("no such folder; name one")

    running = serve(load, ready=False)
    wait_until(lambda: running.left == [EXIT_START])
    assert running.client.get("/health/live").status_code == 200
    assert "cannot start: no such folder; name one" in caplog.text


def test_leaving_while_the_job_runs_harms_nobody(serve: Serve) -> None:
    engine = GatedEngine()
    running = serve(engine)
    with connect_and_send(running, "leaves"):
        engine.wait_for_batch()
    wait_until(lambda: running.metric("sana_sprint_requests_total", route="/generate", status="499") == 1)
    engine.gate.set()
    assert running.generate().status_code == 200
    assert running.metric("sana_sprint_jobs_dropped_total", reason="client_gone") == 0  # it ran


def test_a_job_whose_client_left_is_not_run_again_after_its_batch_failed(serve: Serve) -> None:
    engine = GatedEngine()
    running = serve(engine)
    requests = queue_up(running, engine, ["a [[raise]]"])
    with connect_and_send(running, "leaves"):
        running.wait_for_queued(2)
        engine.gate.set()
        engine.gate.clear()  # the first batch goes, the second is held
        wait_until(lambda: len(engine.seen) == 2, "the second batch")
    wait_until(lambda: running.metric("sana_sprint_requests_total", route="/generate", status="499") == 1)
    engine.gate.set()
    assert [one.result().status_code for one in requests] == [200, 500]
    assert prompts_seen(engine) == [["holds the engine"], ["a [[raise]]", "leaves"], ["a [[raise]]"]]


def test_a_deadline_covers_the_decoding_of_images(serve: Serve) -> None:
    running = serve()
    codec, decode = running.service.codec, running.service.codec.decode

    async def slow(*arguments: Any) -> Any:
        await asyncio.sleep(0.05)
        return await decode(*arguments)

    codec.decode = slow  # type: ignore[method-assign]  # a slow disk, a busy pool
    image = image_file(np.zeros((8, 8, 3), dtype=np.uint8))
    body = {"prompt": "x", "size": "64x64", "timeout_ms": "20"}
    answer = running.client.post("/v1/images/edits", files={"image": image}, data=body)
    assert answer.status_code == 504
    assert running.service.scheduler._queue.in_flight == 0


def test_the_shutdown_timeout_drops_jobs_that_have_not_begun(serve: Serve) -> None:
    engine = GatedEngine(max_batch=1)
    running = serve(engine, max_batch=1, shutdown_timeout_s=0.05)
    running_job, waiting_job = queue_up(running, engine, ["waits"])
    drain = asyncio.run_coroutine_threadsafe(running.service.scheduler.drain(), loop_of(running))
    drain.result(30)
    assert waiting_job.result().json()["code"] == "draining"
    engine.gate.set()
    assert running_job.result().status_code == 200
    assert running.metric("sana_sprint_jobs_dropped_total", reason="draining") == 1


def test_retry_after_grows_with_what_is_inside(serve: Serve) -> None:
    engine = GatedEngine(max_batch=1, delay_s=0.4)
    engine.gate.set()
    running = serve(engine, max_batch=1, max_queue=8)
    assert running.generate().status_code == 200  # measures the time per job
    engine.gate.clear()
    engine.delay_s = 0.0
    requests = queue_up(running, engine, [str(i) for i in range(8)])
    assert 3 <= int(running.generate().headers["retry-after"]) <= 5  # nine jobs of 0.4 s
    engine.gate.set()
    assert [one.result().status_code for one in requests] == [200] * 9


def test_gauges_show_what_waits_and_what_runs(serve: Serve) -> None:
    engine = GatedEngine(max_batch=1)
    running = serve(engine, max_batch=1)
    requests = queue_up(running, engine, ["a", "b"])
    assert running.metric("sana_sprint_jobs_running") == 1
    assert running.metric("sana_sprint_jobs_waiting") == 2
    engine.gate.set()
    assert [one.result().status_code for one in requests] == [200] * 3
    assert running.metric("sana_sprint_jobs_running") == 0
    assert running.metric("sana_sprint_jobs_waiting") == 0


def test_no_thread_and_no_task_is_left_behind(serve: Serve) -> None:
    running = serve()
    assert running.generate(num_images=4).status_code == 200
    tasks = asyncio.run_coroutine_threadsafe(count_tasks(), loop_of(running)).result(30)
    for _ in range(20):
        assert running.generate().status_code == 200
    assert asyncio.run_coroutine_threadsafe(count_tasks(), loop_of(running)).result(30) <= tasks
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("engine") == 1


async def count_tasks() -> int:
    return len(asyncio.all_tasks())


def loop_of(running: Running) -> asyncio.AbstractEventLoop:
    loop = running.service.scheduler.loop
    assert loop is not None
    return loop


def test_the_engine_is_closed_on_the_thread_that_ran_it() -> None:
    class Recorded(FakeEngine):
        threads: list[str] = []  # noqa: RUF012 - one list for the one engine of this test

        def warmup(self) -> None:
            self.threads.append(threading.current_thread().name)

        def close(self) -> None:
            self.threads.append(threading.current_thread().name)

    async def live() -> None:
        scheduler = make_batcher(Recorded)
        await scheduler.start()
        await scheduler.ready.wait()
        await scheduler.close()

    asyncio.run(live())
    assert Recorded.threads == ["engine", "engine"]


def make_batcher(load: Callable[[], Engine]) -> Scheduler:
    return Scheduler(
        FixedEngineSource(load),
        Codec(1),
        max_batch=8,
        max_queue=8,
        batch_timeout_s=30,
        shutdown_timeout_s=5,
        metrics=Metrics(request_buckets=(1.0,), stage_buckets=(1.0,)),
        leave=lambda _: None,
        when_ready=lambda _: None,
    )


def test_an_image_leaves_while_the_next_one_is_made(serve: Serve) -> None:
    first_is_out = threading.Event()

    class OneByOne(GatedEngine):
        """Makes its second image only when the first one has reached its client."""

        def generate(self, jobs: Sequence[Job], deliver: Deliver | None = None) -> list[RawImage]:
            images = super().generate(jobs)
            assert deliver is not None
            deliver(0, images[0])
            if len(jobs) > 1:
                assert first_is_out.wait(PATIENCE_S), "the first image waited for the second"
                deliver(1, images[1])
            return images

    engine = OneByOne(max_batch=2)
    running = serve(engine, max_batch=2)
    _, first, second = queue_up(running, engine, ["a", "b"])
    engine.gate.set()
    assert first.result().status_code == 200
    first_is_out.set()
    assert second.result().status_code == 200


def test_what_fails_behind_an_image_does_not_make_it_again(serve: Serve) -> None:
    class Stumbling(GatedEngine):
        """Fails after the first image of two."""

        def generate(self, jobs: Sequence[Job], deliver: Deliver | None = None) -> list[RawImage]:
            images = super().generate(jobs)
            assert deliver is not None
            deliver(0, images[0])
            if len(jobs) > 1:
                raise RuntimeError("behind the first")
            return images

    engine = Stumbling(max_batch=2)
    running = serve(engine, max_batch=2)
    requests = queue_up(running, engine, ["a", "b"])
    engine.gate.set()
    assert [request.result().status_code for request in requests] == [200, 200, 200]
    assert prompts_seen(engine) == [["holds the engine"], ["a", "b"], ["b"]]
