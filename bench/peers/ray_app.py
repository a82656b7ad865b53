"""A peer: Ray Serve with @serve.batch, as documented."""

import asyncio
import os
import signal
import sys
import threading
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from bench.peers.shared_engine import ENGINE_VARIABLE, MAX_BATCH, PATH, WAIT_S, GenerateBody, SharedEngine
from engines.types import Job


@serve.deployment(max_ongoing_requests=256, num_replicas=1)
class Generate:
    def __init__(self) -> None:
        self._work = SharedEngine()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_S)  # type: ignore[untyped-decorator]  # Ray's own
    async def png_files(self, jobs: list[Job]) -> list[bytes]:
        return await asyncio.to_thread(self._work.png_files, jobs)

    async def __call__(self, request: Request) -> Response:
        job = self._work.job(GenerateBody.model_validate_json(await request.body()))
        file: bytes = await self.png_files(job)
        return Response(file, media_type="image/png", headers={"content-length": str(len(file))})


def main() -> None:
    environment = {ENGINE_VARIABLE: os.environ[ENGINE_VARIABLE]}
    ray.init(include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    deployment: Any = Generate  # the decorator's type
    serve.run(deployment.bind(), route_prefix=PATH)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ended.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
