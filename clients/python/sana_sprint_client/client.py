"""The client for threads."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from sana_sprint_client.errors import ConnectionFailedError
from sana_sprint_client.generation import PATH, Image, Options, headers, parse_image, request_bodies
from sana_sprint_client.retries import Retries


class Client:
    """A client of one server, thread-safe. `close` or a `with` block closes its connections."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        retries: Retries = Retries(),  # noqa: B008  # frozen
    ) -> None:
        self._http = httpx.Client(base_url=url, headers=headers(api_key), timeout=timeout_s)
        self._retries = retries

    def generate(self, prompt: str, *, seed: int | None = None, **options: Unpack[Options]) -> Image:
        """Generates one image. Raises GenerationError for a refusal, ConnectionFailedError without a response."""
        (body,) = request_bodies(prompt, 1, seed, options)
        return self._generate(body)

    def stream(
        self, prompt: str, count: int, *, seed: int | None = None, **options: Unpack[Options]
    ) -> Iterator[Image]:
        """Yields `count` images, each when it is ready; the server batches them.

        Image i has the seed + i. The first error ends the iteration. Raises as `generate`.
        """
        bodies = request_bodies(prompt, count, seed, options)
        pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix="sana-sprint")
        try:
            for image in as_completed([pool.submit(self._generate, body) for body in bodies]):
                yield image.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def info(self) -> dict[str, Any]:
        """Returns the server's checkpoint, backend, device and limits (GET /v1/info)."""
        response = self._send(lambda: self._http.get("/v1/info"))
        info: dict[str, Any] = response.raise_for_status().json()
        return info

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _generate(self, body: dict[str, Any]) -> Image:
        return parse_image(self._send(lambda: self._http.post(PATH, json=body)))

    def _send(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        attempt = 1
        while True:
            try:
                response = send()
            except httpx.TransportError as error:
                raise ConnectionFailedError(f"{self._http.base_url}: {error!r}") from error
            pause_s = self._retries.pause(attempt, response.status_code, response.headers)
            if pause_s is None:
                return response
            time.sleep(pause_s)
            attempt += 1
