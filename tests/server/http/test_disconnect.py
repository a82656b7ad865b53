"""A client that leaves ends its request also where another ASGI server runs the app (test_statuses: ours)."""

import asyncio
import json

from running_server import GatedEngine
from starlette.types import Message, Scope

from server.app import create_app
from server.settings import Settings

BODY = json.dumps({"prompt": "a red circle", "width": 64, "height": 64}).encode()


def test_without_our_http_protocol_a_disconnect_comes_from_asgi() -> None:
    engine = GatedEngine()
    app = create_app(engine, Settings(backend="fake"))
    sent: list[Message] = []

    async def post() -> None:
        left = asyncio.Event()
        body = [{"type": "http.request", "body": BODY, "more_body": False}]

        async def receive() -> Message:
            if body:
                return body.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
        scope: Scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": headers}
        scheduler = app.state.service.scheduler
        async with asyncio.timeout(30), app.router.lifespan_context(app):
            await scheduler.ready.wait()
            request = asyncio.create_task(app(scope | {"root_path": "", "server": ("x", 80)}, receive, send))
            while not engine.seen:
                await asyncio.sleep(0.001)
            left.set()
            await request
            assert scheduler.in_flight == 0
            engine.gate.set()

    asyncio.run(post())
    assert not sent
