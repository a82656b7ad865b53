"""Keeps Python's cyclic garbage collector away from start-up and from what start-up leaves.

A start makes 220,000 objects that live as long as the process, mostly of torch. Collections during the imports find
nothing. A full one while serving would visit them all, and stop every thread for 0.1 s.
"""

import gc


def pause_collector() -> None:
    """Turns the collector off until `resume_collector`."""
    gc.disable()


def resume_collector() -> None:
    """Turns a paused collector on. It never visits the objects of this moment."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
