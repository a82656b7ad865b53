"""A call of the kit limits its steps and skips finished ones; a killed call leaves no process to the next."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.acceptance.kit import running
from bench.acceptance.kit.bars import Facts, bars, show
from bench.acceptance.kit.calls import CALLS, Place, Step
from bench.acceptance.kit.running import GROUP, MARK, Runner

REHEARSAL, CARD = True, False


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "work").mkdir()
    return Place(tmp_path / "work", tmp_path / "out", REHEARSAL)


def program(name: str, code: str, limit_s: float = 60, **more: Any) -> Step:
    return Step(name, ("-c", code), limit_s, **more)


def runner(place: Place, left_s: float = 300) -> Runner:
    return Runner(place, time.monotonic() + left_s)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_done_is_not_done_again(place: Place) -> None:
    count = program(
        "count", f"open({str(place.work / 'runs')!r}, 'a').write('x'); print('words'); print('{{\"a\": 1}}')"
    )
    for _ in range(2):
        runner(place).run(count)
    assert (place.work / "runs").read_text() == "x"
    [line] = lines(place.out / "steps.jsonl")
    assert (line["name"], line["found"]) == ("count", {"a": 1})


def test_what_was_built_is_known_where_it_lies(place: Place, tmp_path: Path) -> None:
    step = program("build", "pass", builds=True)
    runner(place).run(step)
    elsewhere = Place(tmp_path / "other", place.out, REHEARSAL)
    elsewhere.work.mkdir()
    runner(elsewhere).run(step)
    assert [len(lines(one.work / "built.jsonl")) for one in (place, elsewhere)] == [1, 1]


def test_a_step_that_fails_or_hangs_costs_itself_alone(place: Place) -> None:
    call = runner(place)
    call.run(program("fails", "import sys; sys.exit('no such card')"))
    call.run(program("hangs", "import signal; signal.pause()", limit_s=0.2))
    call.run(program("works", "pass"))
    found = {line["name"]: line.get("error") for line in lines(place.out / "steps.jsonl")}
    assert found == {
        "fails": "BenchError: code 1: no such card",
        "hangs": "BenchError: not done after 1 s",
        "works": None,
    }
    assert call.left_out == 2
    assert not (place.work / GROUP).exists()


def test_the_end_of_a_call_ends_its_step_and_begins_no_other(place: Place) -> None:
    call = runner(place, running.LEAST_S - 1)
    call.run(program("late", "pass"))
    assert call.left_out == 1
    assert not (place.out / "steps.jsonl").exists()


def test_a_step_is_left_out_where_it_cannot_run(place: Place) -> None:
    call = runner(place)
    call.run(program("module", "pass", modules=("no_such_module",)))
    call.run(program("path", "pass", paths=(place.work / "engine",)))
    call.run(program("card", "pass", card=True))
    assert call.skipped == {
        "module": "no_such_module is not installed",
        "path": f"{place.work / 'engine'} is not there",
        "card": "a rehearsal has no card",
    }
    assert call.left_out == 0
    running.keep(place, call.skipped)
    again = runner(place)
    (place.work / "engine").mkdir()
    again.run(program("path", "pass", paths=(place.work / "engine",)))
    assert set(again.skipped) == {"module", "card"}, "what another call left out is told as well"


def test_a_call_that_was_killed_leaves_nothing_behind_in_the_next_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, str(place.work))
    pause = "import signal; print('up', flush=True); signal.pause()"
    left = subprocess.Popen([sys.executable, "-c", pause], stdout=subprocess.PIPE, start_new_session=True)
    assert left.stdout is not None
    assert left.stdout.readline() == b"up\n"
    (place.work / GROUP).write_text(f"{left.pid}\n")
    runner(place)
    assert left.wait(60) == -signal.SIGKILL
    left.stdout.close()
    monkeypatch.delenv(MARK)
    other = subprocess.Popen([sys.executable, "-c", pause], stdout=subprocess.PIPE, start_new_session=True)
    assert other.stdout is not None
    assert other.stdout.readline() == b"up\n"
    (place.work / GROUP).write_text(f"{other.pid}\n")
    runner(place)
    assert other.poll() is None, "a number that was given out again is no process of ours"
    other.kill()
    other.wait()
    other.stdout.close()


def test_a_calls_own_end_ends_its_step(place: Place) -> None:
    """In a process of its own, which its step sends SIGTERM; `signalled` has the step's process id."""
    asks = f"import os, signal; open({str(place.work / 'signalled')!r}, 'w').write(str(os.getpid())); "
    asks += "os.kill(os.getppid(), signal.SIGTERM); signal.pause()"
    call = f"""
import signal, sys, time
from pathlib import Path
from bench.acceptance.kit.calls import Place, Step
from bench.acceptance.kit.running import Runner
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
place = Place(Path({str(place.work)!r}), Path({str(place.out)!r}), True)
Runner(place, time.monotonic() + 300).run(Step("asks", ("-c", {asks!r}), 60))
"""
    ended = subprocess.run([sys.executable, "-c", call], cwd=running.ROOT, check=False)
    assert ended.returncode == 143
    assert not (place.work / GROUP).exists()
    assert not Path("/proc", (place.work / "signalled").read_text()).exists()


@pytest.mark.parametrize("call", CALLS)
def test_a_calls_steps_have_names_limits_and_programs_that_are_there(call: str, tmp_path: Path) -> None:
    steps = CALLS[call](Place(tmp_path, tmp_path, CARD))
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        assert 0 < step.limit_s < 600
        program = step.arguments[1].replace(".", "/") if step.arguments[0] == "-m" else step.arguments[0]
        stem = running.ROOT / program
        assert any(path.is_file() for path in (stem, stem.with_suffix(".py"), stem / "__main__.py")), program
    assert call == "rest" or steps[0].name == "kernels"
    for step in steps:
        if "bench.acceptance.over_http" in step.arguments:
            engine = step.arguments[step.arguments.index("--engine") + 1]
            assert (engine == "none") != step.name.startswith("served native"), "a server builds none of its own"
    told = {
        "engine": "precisions random:sprint-0.6b",
        "http": "http fp8",
        "rest": "latency diffusers-compiled random:sprint-0.6b",
    }
    assert told[call] in [step.name for step in steps[:2]]


def figures(**about: Any) -> list[dict[str, Any]]:
    def line(name: str, precision: str = "bf16", engine: str | None = None, **found: Any) -> dict[str, Any]:
        built = {} if engine is None else {"engine": engine}
        return {"name": name, "about": {"model": "m", "precision": precision, **built}, **found}

    return [
        line("jpeg alone", ms={"p50": 20.0, "p99": 25.0}, stages={"text": 2.0, "denoise": 5.0, "decode": 12.0}),
        line("jpeg alone", "fp8", ms={"p50": 18.0, "p99": 19.0}, stages={"decode": 10.0}),
        line("ready", seconds=40.0),
        line("ready", engine="e", seconds=9.0),
        line("closed loop 32", per_second=60.0),
        line("8 at once", mean_ms=90.0),
        line("memory", **{'sana_sprint_gpu_memory_bytes{kind="used"}': 13e9}),
        line("2 steps alone", error="BenchError: late"),
        line("projected", transfers={"pageable": 0, "pinned": 7}, waits=2, launches_outside_graphs=9),
        *([about] if about else []),
    ]


def test_a_row_has_its_bar_beside_its_figure() -> None:
    def row(who: str, seconds: float) -> dict[str, Any]:
        return {"who": who, "batch": 1, "steps": 1, "seconds": {"total": {"p50": seconds}}}

    stages = [{"model": "m", "rows": [row("ours", 0.02)]}, {"model": "m", "rows": [row("diffusers", 0.15)]}]
    facts = Facts(figures(), stages)
    found = {bar.what: (bar.of(facts, "m"), bar.verdict(bar.of(facts, "m"))) for bar in bars(("bf16", "fp8"))}
    assert found["text"] == (2.0, "held")
    assert found["denoise"] == (5.0, "missed")
    assert found["decode, fp8"] == (10.0, "held")
    assert found["p99 over p50, one client"] == (1.25, "missed")
    assert found["engine, times diffusers eager"] == (pytest.approx(7.5), "missed")
    assert found["engine, times diffusers compiled"] == (None, "-")
    assert found["pictures a second, 32 clients, bf16"] == (60.0, "held")
    assert found["mean time to a picture, 8 at once, over one alone"] == (4.5, "missed")
    assert found["ready with a native engine, s"] == (9.0, "held")
    assert found["memory at batch 8, GB"] == (pytest.approx(13.0), "held")
    assert found["2 steps, over HTTP, p50"] == (None, "-")
    assert found["pageable copies and waits, counted"] == (2.0, "held")


def test_the_page_tells_what_was_left_out_and_a_rehearsal_holds_no_bar() -> None:
    machine = {"date": "2026-11-27", "revision": "abc", "torch": "2.13.0", "python": "3.12"}
    about = {"card": "H100", "machine": machine, "skipped": {"served": "an engine is not there"}}
    facts = Facts(figures(), steps=[{"name": "http bf16", "error": "BenchError: code 1: a|b"}])
    page = show(facts, ("m",), about, held=True)
    assert "revision abc" in page
    assert "left out: an engine is not there" in page
    assert "code 1: a/b" in page
    assert "missed" in page
    rehearsed = show(facts, ("m",), about, held=False)
    assert "missed" not in rehearsed
    assert "No figure here is a card's" in rehearsed
