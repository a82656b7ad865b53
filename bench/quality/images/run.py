"""Makes the missing images of a folder with several makers at once."""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from bench.quality.images.folder import ImageFolder, JournalEntry, digest
from bench.quality.images.layouts import ImageFile, chunks, encoded, image_files, write_side_files
from bench.quality.images.makers import FileResult, Maker, SamplingOptions
from bench.quality.images.prompt_sets import PromptSet

Progress = Callable[[int], object]  # files done since the last call


def make_images(
    prompts: PromptSet,
    makers: Sequence[Maker],
    sampling: SamplingOptions,
    out: Path,
    *,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Makes every image of `prompts` that `out` lacks; returns the state of the folder.

    Raises BenchError if `out` holds images of another origin, and what a maker raises; finished images are kept.
    """
    files = image_files(prompts, samples, seed)
    identity = {
        "prompts": {"kind": prompts.kind, "sha256": prompts.sha256, "count": len(prompts.entries)},
        "files": len(files),
        "samples": samples,
        "seed": seed,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "made_by": _common(makers),
    }
    folder = ImageFolder(out)
    with folder.locked(identity):
        write_side_files(prompts, folder.images)
        existing = folder.compact()
        progress(len(existing))
        began = time.perf_counter()
        _make(files, existing.keys(), makers, folder, progress)
        seconds = time.perf_counter() - began
        finished = folder.finished()
        result = {
            "files": len(files),
            "made_now": len(files) - len(existing),
            "missing": len({file.name for file in files} - finished.keys()),
            "twice": folder.duplicate_count(),
            "prompts_truncated": sum(entry.prompt_truncated for entry in finished.values()),
            "digest": digest(finished),
        }
        folder.finish(result)
    return {**result, "seconds": round(seconds, 2), "identity": identity}


def _common(makers: Sequence[Maker]) -> dict[str, Any]:
    """Returns the facts of the first maker: all are started alike."""
    facts: list[Mapping[str, Any]] = [maker.facts for maker in makers]
    return dict(facts[0])


def _make(
    files: Sequence[ImageFile],
    existing: Container[str],
    makers: Sequence[Maker],
    folder: ImageFolder,
    progress: Progress,
) -> None:
    """Runs each maker in a thread until no group is left; the first error ends all.

    Groups are those of a whole run. A group that lacks a file is made whole: batch mates can change an image's last
    bits, and a continued run must end with the same files.
    """
    waiting: queue.SimpleQueue[list[ImageFile]] = queue.SimpleQueue()
    for group in chunks(files, min((maker.batch for maker in makers), default=1)):
        if any(file.name not in existing for file in group):
            waiting.put(group)
    stop, writing = threading.Event(), threading.Lock()

    def write(file: ImageFile, finished: FileResult) -> None:
        content = encoded(finished.images, file.name)
        sha256 = hashlib.sha256(content).hexdigest()
        with writing:
            folder.add(
                JournalEntry(file.name, file.prompt, file.seeds, file.tag, sha256, finished.prompt_truncated), content
            )
            progress(1)

    def work(maker: Maker) -> None:
        try:
            while not stop.is_set():
                try:
                    group = waiting.get_nowait()
                except queue.Empty:
                    return
                for file, finished in zip(group, maker.make(group), strict=True):
                    if file.name not in existing:
                        write(file, finished)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(len(makers)) as pool:
        running = [pool.submit(work, maker) for maker in makers]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # on Ctrl-C too: running groups are finished and kept
        for future in running:
            future.result()
