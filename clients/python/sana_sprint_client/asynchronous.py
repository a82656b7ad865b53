"""The client for asyncio: as `Client`, awaited."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from sana_sprint_client.errors import ConnectionFailedError
from sana_sprint_client.generation import PATH, Image, Options, bodies, headers, image_of
from sana_sprint_client.retries import Retries


class AsyncClient:
    """One server; `aclose` or an `async with` block ends its connections."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        retries: Retries = Retries(),  # noqa: B008  # frozen
    ) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=headers(api_key), timeout=timeout_s)
        self._retries = retries

    async def generate(self, prompt: str, *, seed: int | None = None, **options: Unpack[Options]) -> Image:
        """One image. Raises as Client.generate. Cancelling closes the connection, and the server drops the job."""
        (body,) = bodies(prompt, 1, seed, options)
        return await self._made(body)

    async def stream(
        self, prompt: str, count: int, *, seed: int | None = None, **options: Unpack[Options]
    ) -> AsyncIterator[Image]:
        """`count` images, each as soon as it is there, as Client.stream; those left are dropped with the iteration."""
        tasks = [asyncio.create_task(self._made(body)) for body in bodies(prompt, count, seed, options)]
        try:
            for made in asyncio.as_completed(tasks):
                yield await made
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def info(self) -> dict[str, Any]:
        """Returns the running engine and its limits (GET /v1/info)."""
        response = await self._sent(lambda: self._http.get("/v1/info"))
        told: dict[str, Any] = response.raise_for_status().json()
        return told

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _made(self, body: dict[str, Any]) -> Image:
        return image_of(await self._sent(lambda: self._http.post(PATH, json=body)))

    async def _sent(self, send: Callable[[], Awaitable[httpx.Response]]) -> httpx.Response:
        attempt = 1
        while True:
            try:
                response = await send()
            except httpx.TransportError as error:
                raise ConnectionFailedError(f"{self._http.base_url}: {error!r}") from error
            pause_s = self._retries.pause(attempt, response.status_code, response.headers)
            if pause_s is None:
                return response
            await asyncio.sleep(pause_s)
            attempt += 1
