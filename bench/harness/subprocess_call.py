"""Runs a function in a fresh process, so that a crash, hang or broken CUDA context does not affect the caller."""

import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

from bench.harness.errors import BenchError

P = ParamSpec("P")
R = TypeVar("R")


def run_in_subprocess(limit_s: float | None, call: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Returns the result of `call` in a fresh process; call, arguments and result must be picklable.

    Raises what `call` raises. Raises BenchError if the process dies, or has no result after `limit_s` seconds (None: no
    limit).
    """
    context = get_context("spawn")  # a fork would share the parent's CUDA
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, call, arguments, options))
    process.start()
    sender.close()
    with receiver:
        try:
            if not receiver.poll(limit_s):
                process.kill()
                raise BenchError(f"not done after {limit_s:g} s; its process was ended")
            result, raised = receiver.recv()
        except EOFError:
            process.join()
            raise BenchError(f"its process died: {_ending(process.exitcode)}") from None
        finally:
            process.join()
    if raised is not None:
        raise raised
    returned: R = result
    return returned


def _send_result(
    sender: Connection, call: Callable[..., object], arguments: tuple[object, ...], options: dict[str, object]
) -> None:
    try:
        outcome: tuple[object, Exception | None] = call(*arguments, **options), None
    except Exception as failure:  # raised again where the answer is awaited
        outcome = None, failure
    sender.send(outcome)


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit {code}"
