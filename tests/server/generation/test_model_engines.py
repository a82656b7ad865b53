"""Several models on one engine thread: a batch holds one model, the oldest job goes first, each has its own limits."""

from itertools import groupby

import numpy as np
import pytest
from running_server import PATIENCE_S, GatedEngine, Running, Serve, read_image, wait_until

from engines.errors import JobError
from engines.fake import RAISE, FakeEngine, FaultInjection, expected_pixels
from engines.types import Job
from server.errors import InvalidError
from server.generation.model_engines import ModelEngines, chosen_model, engines_by_name


class Closing(FakeEngine):
    closed = False

    def close(self) -> None:
        self.closed = True
        super().close()


def named(**engines: FakeEngine) -> ModelEngines:
    return ModelEngines(engines)


def two() -> tuple[Closing, Closing]:
    return Closing(checkpoint="one"), Closing(checkpoint="two")


def test_a_job_runs_on_the_engine_of_its_model() -> None:
    first, second = two()
    both = named(one=first, two=second)
    for model, made_by in (("", "one"), ("one", "one"), ("two", "two")):
        job = Job("a red circle", 7, 64, 64, model=model)
        [image] = both.generate([job])
        np.testing.assert_array_equal(image.pixels, expected_pixels(job, made_by))
    assert (first.batches, second.batches) == ([1, 1], [1])
    with pytest.raises(JobError, match="model: got 'three', allowed: one, two"):
        both.generate([Job("a red circle", 7, 64, 64, model="three")])


def test_a_replaced_engine_is_closed_alone() -> None:
    first, second = two()
    before, better = named(one=first, two=second), Closing(checkpoint="two")
    after = before.with_replaced({"two": better})
    before.close()
    assert (first.closed, second.closed, better.closed) == (False, True, False)
    assert after.engines == {"one": first, "two": better}
    after.close()
    assert (first.closed, better.closed) == (True, True)


def test_one_model_has_no_name_of_its_own() -> None:
    """So that requests which name it share batches with those that do not."""
    engine = FakeEngine(checkpoint="one")
    assert chosen_model(engine, None) == chosen_model(engine, "one") == ("", engine)
    assert engines_by_name(engine) == {"one": engine}
    with pytest.raises(InvalidError, match="model: got 'two', allowed: one"):
        chosen_model(engine, "two")


def gated_models(serve: Serve, **options: object) -> tuple[Running, GatedEngine, GatedEngine]:
    engines = GatedEngine(checkpoint="one"), GatedEngine(checkpoint="two", **options)
    return serve(named(one=engines[0], two=engines[1]), model="one,two"), *engines


def test_models_take_turns_by_age_and_never_share_a_batch(serve: Serve) -> None:
    running, one, two = gated_models(serve)
    pending = [running.submit_generate("first", model="one")]
    one.wait_for_batch()
    for number, model in enumerate(("two", "one", "one", "two", "one", "two"), start=1):
        pending.append(running.submit_generate(f"{model} {number}", model=model))
        running.wait_for_queued(number)
    one.gate.set()
    two.gate.set()
    assert [each.result().status_code for each in pending] == [200] * 7
    assert [[job.prompt for job in batch] for batch in two.seen] == [["two 1", "two 4", "two 6"]]
    assert [[job.prompt for job in batch] for batch in one.seen] == [["first"], ["one 2", "one 3", "one 5"]]


def test_a_busy_model_does_not_starve_the_other(serve: Serve) -> None:
    """A job of the rare model runs before those of the busy one that came after it, whatever waits before them."""
    running, one, two = gated_models(serve)
    pending = [running.submit_generate("first", model="one")]
    one.wait_for_batch()
    for number in range(10):
        pending.append(running.submit_generate(f"busy {number}", model="one"))
        running.wait_for_queued(number + 1)
    pending.append(running.submit_generate("rare", model="two"))
    running.wait_for_queued(11)
    one.gate.set()
    two.wait_for_batch()  # two batches of the busy model at most went first
    order = [job.prompt for batch in one.seen for job in batch]
    for number in range(10, 20):
        pending.append(running.submit_generate(f"busy {number}", model="one"))
    wait_until(lambda: running.waiting == 10, "ten more")
    assert order == ["first", *(f"busy {number}" for number in range(len(order) - 1))]
    two.gate.set()
    assert {each.result().status_code for each in pending} == {200}


def test_each_model_has_its_own_largest_batch(serve: Serve) -> None:
    running, one, two = gated_models(serve, max_batch=2)
    pending = [running.submit_generate("first", model="one")]
    one.wait_for_batch()
    for number in range(8):
        pending.append(running.submit_generate(str(number), model="two" if number % 2 else "one"))
        running.wait_for_queued(number + 1)
    one.gate.set()
    two.gate.set()
    assert {each.result().status_code for each in pending} == {200}
    assert [len(batch) for batch in one.seen] == [1, 4]
    assert [len(batch) for batch in two.seen] == [2, 2]


def test_a_model_that_fails_is_found_beside_one_that_works(serve: Serve) -> None:
    """Successes of the other model do not hide that every job of this one fails."""
    broken = FakeEngine(checkpoint="two", faults=FaultInjection(broken_from_call=0))
    running = serve(named(one=FakeEngine(checkpoint="one"), two=broken), model="one,two")
    for number in range(3):
        assert running.generate(f"x {number}", model="two").status_code == 500
        running.generate(f"y {number}", model="one")
    wait_until(lambda: running.left != [], "the end of the process", within_s=PATIENCE_S)


def test_a_poisonous_prompt_of_one_model_harms_no_job_of_the_other(serve: Serve) -> None:
    running = serve(named(one=FakeEngine(checkpoint="one"), two=FakeEngine(checkpoint="two")), model="one,two")
    assert running.generate(RAISE, model="two").status_code == 500
    answer = running.generate("a red circle", model="one", seed=7)
    expected = expected_pixels(Job("a red circle", 7, 64, 64), "one")
    np.testing.assert_array_equal(read_image(answer.content), expected)


def test_batches_are_pure_however_they_came(serve: Serve) -> None:
    running, one, two = gated_models(serve)
    pending = [running.submit_generate("first", model="one")]
    one.wait_for_batch()
    pending += [running.submit_generate(str(number), model=("one", "two")[number % 2]) for number in range(40)]
    running.wait_for_queued(40)
    one.gate.set()
    two.gate.set()
    assert {each.result().status_code for each in pending} == {200}
    for engine, name in ((one, "one"), (two, "two")):
        models = [key for batch in engine.seen for key, _ in groupby(job.model for job in batch)]
        assert models == [name] * len(engine.seen)
