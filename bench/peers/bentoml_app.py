"""A peer: BentoML with adaptive batching, as documented: lists of one entry per image.

Its batched routes speak JSON, so an image travels as base64.
"""

from base64 import b64encode

import bentoml  # type: ignore[import-not-found]  # in the peer's own environment only

from bench.peers.shared_engine import MAX_BATCH, PATH, GenerateBody, SharedEngine


@bentoml.service(workers=1, traffic={"timeout": 120, "max_concurrency": 512}, metrics={"enabled": False})
class Generate:
    def __init__(self) -> None:
        self._work = SharedEngine()

    # The latency that it may add: its own scheduler learns how long to wait within it.
    @bentoml.api(route=PATH, batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=120_000)  # type: ignore[untyped-decorator]  # as above
    def generate(self, requests: list[GenerateBody]) -> list[str]:
        jobs = [self._work.job(request) for request in requests]
        return [b64encode(file).decode() for file in self._work.png_files(jobs)]
