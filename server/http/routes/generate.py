"""POST /generate: one image as bytes, or one to eight as JSON."""

import re
import time

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from server.generation.generator import GenerationResult
from server.http.body import read_json
from server.http.disconnect import cancel_on_disconnect
from server.http.plain_route import PlainRoute
from server.http.routes import openapi
from server.http.routes.schemas import GenerateRequest
from server.http.state import app_state, request_context, result_headers
from server.telemetry.timings import milliseconds

router = APIRouter(route_class=PlainRoute)


@router.post("/generate", **openapi.GENERATE)
async def generate(request: Request) -> Response:
    """Generates one to eight images.

    Returns one image as bytes, unless the Accept header asks for application/json; returns several as JSON.
    """
    state, context = app_state(request), request_context(request)
    body = await read_json(request, GenerateRequest, state)
    as_json = body.num_images > 1 or prefers_json(request.headers.get("accept", ""))
    generation = state.generator.generate(body.generation_request(base64=as_json), context.arrived)
    del body  # frees its large images as soon as they are decoded
    result = await cancel_on_disconnect(generation, request)
    headers = result_headers(request, result)
    if not as_json:
        image = result.images[0]
        headers["x-seed"] = str(image.seed)
        return Response(image.content, headers=headers, media_type=f"image/{result.output_format}")
    content = await state.codec.run(answer_json, result, context.request_id)
    return Response(content, headers=headers, media_type="application/json")


def prefers_json(accept: str) -> bool:
    """Returns True if an Accept header names application/json, and no image type with a higher weight (RFC 9110)."""
    weights = {"application/json": 0.0, "image/": 0.0}
    for part in accept.lower().split(","):
        name, _, parameters = part.partition(";")
        name = "image/" if name.strip().startswith("image/") else name.strip()
        if name in weights:
            weight = re.search(r"q\s*=\s*([01](?:\.\d*)?)", parameters)
            weights[name] = max(weights[name], float(weight[1]) if weight else 1.0)
    return weights["application/json"] > 0 and weights["application/json"] >= weights["image/"]


def answer_json(result: GenerationResult, request_id: str) -> bytes:
    """Returns the JSON body of the answer (schemas.GenerateAnswer)."""
    return to_json(
        {
            "id": request_id,
            "created": int(time.time()),
            "model": result.model,
            "images": [
                {
                    "b64": image.content.decode("ascii"),
                    "seed": image.seed,
                    "width": result.width,
                    "height": result.height,
                    "format": result.output_format,
                }
                for image in result.images
            ],
            "timings_ms": milliseconds(result.timings_ms),
            "prompt_truncated": result.prompt_truncated,
        }
    )
