"""The client for threads."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from sana_sprint_client.errors import ConnectionFailedError
from sana_sprint_client.generation import PATH, Image, Options, bodies, headers, image_of
from sana_sprint_client.retries import Retries


class Client:
    """One server. May be used by several threads; `close` or a `with` block ends its connections."""

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
        """One image. Raises GenerationError for what the server refuses, ConnectionFailedError without an answer."""
        (body,) = bodies(prompt, 1, seed, options)
        return self._made(body)

    def stream(
        self, prompt: str, count: int, *, seed: int | None = None, **options: Unpack[Options]
    ) -> Iterator[Image]:
        """`count` images, each as soon as it is there; the server makes them in common batches.

        Image i has the seed + i. The first error ends the iteration. Raises as `generate`.
        """
        asked = bodies(prompt, count, seed, options)
        pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix="sana-sprint")
        try:
            for made in as_completed([pool.submit(self._made, body) for body in asked]):
                yield made.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def info(self) -> dict[str, Any]:
        """Returns the running engine and its limits (GET /v1/info)."""
        response = self._sent(lambda: self._http.get("/v1/info"))
        told: dict[str, Any] = response.raise_for_status().json()
        return told

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _made(self, body: dict[str, Any]) -> Image:
        return image_of(self._sent(lambda: self._http.post(PATH, json=body)))

    def _sent(self, send: Callable[[], httpx.Response]) -> httpx.Response:
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
