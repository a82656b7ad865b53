"""Calls a server with the unmodified openai client; test_openai_clients.py runs it in its own virtualenv.

argv: base URL, image file. Prints its results as JSON.
"""

import asyncio
import json
import sys

import openai

URL, IMAGE = sys.argv[1:]
LOOK = {"model": "sana-sprint", "prompt": "a blue square", "size": "64x96"}


def refused(client: openai.OpenAI) -> dict[str, object]:
    try:
        client.images.generate(**{**LOOK, "size": "100x100"})
    except openai.UnprocessableEntityError as error:
        return {"code": error.code, "param": error.param, "type": error.type}
    return {}


async def concurrently(count: int) -> list[str | None]:
    async with openai.AsyncOpenAI(base_url=URL, api_key="right") as client:
        making = [client.images.generate(**LOOK, extra_body={"seed": seed}) for seed in range(count)]
        return [answer.data[0].b64_json for answer in await asyncio.gather(*making)]


def main() -> None:
    with openai.OpenAI(base_url=URL, api_key="right", max_retries=0) as client:
        generated = client.images.generate(**LOOK, n=2, response_format="b64_json", user="me", extra_body={"seed": 5})
        as_url = client.images.generate(**LOOK, response_format="url", extra_body={"seed": 5})
        with open(IMAGE, "rb") as file:
            edited = client.images.edit(
                **LOOK, image=file, n=1, response_format="b64_json", extra_body={"seed": 5, "strength": 0.25}
            )
        models = [model.id for model in client.models.list()]
        problem = refused(client)
    try:
        openai.OpenAI(base_url=URL, api_key="wrong", max_retries=0).images.generate(**LOOK)
    except openai.AuthenticationError as error:
        unauthorized = error.code
    print(
        json.dumps(
            {
                "version": openai.__version__,
                "generated": [item.b64_json for item in generated.data or []],
                "url": (as_url.data or [])[0].url,
                "edited": [item.b64_json for item in edited.data or []],
                "concurrent": asyncio.run(concurrently(8)),
                "models": models,
                "refused": problem,
                "unauthorized": unauthorized,
            }
        )
    )


main()
