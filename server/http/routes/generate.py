"""POST /generate: a picture or several, as bytes or as JSON."""

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
from server.http.state import app_state, request_context
from server.telemetry.timings import milliseconds, server_timing

router = APIRouter(route_class=PlainRoute)


@router.post("/generate", **openapi.GENERATE)
async def generate(request: Request) -> Response:
    """Makes one to eight pictures.

    One picture comes as image bytes, unless the Accept header asks for application/json; several come as JSON.
    """
    service, context = app_state(request), request_context(request)
    body = await read_json(request, GenerateRequest, service)
    as_json = body.num_images > 1 or prefers_json(request.headers.get("accept", ""))
    making = service.generator.generate(body.generation_request(base64=as_json), context.arrived)
    del body  # it may hold large images, which are not needed once they are decoded
    delivery = await cancel_on_disconnect(making, request.receive)
    request.state.timings = delivery.timings_ms  # for the trace
    headers = {"server-timing": server_timing(delivery.timings_ms)}
    if delivery.prompt_truncated:
        headers["x-prompt-truncated"] = "true"
    if not as_json:
        picture = delivery.images[0]
        headers["x-seed"] = str(picture.seed)
        return Response(picture.content, headers=headers, media_type=f"image/{delivery.output_format}")
    model = service.scheduler.engine.info.checkpoint
    content = await service.codec.run(answer_json, delivery, context.request_id, model)
    return Response(content, headers=headers, media_type="application/json")


def prefers_json(accept: str) -> bool:
    """Whether an Accept header names application/json, and no image type with a higher weight."""
    accept = accept.lower()
    if "application/json" not in accept:
        return False
    json_weight = image_weight = 0.0
    for part in accept.split(","):
        name, _, parameters = part.partition(";")
        found = re.search(r"q\s*=\s*([01](?:\.\d*)?)", parameters)
        weight = float(found.group(1)) if found else 1.0
        if name.strip() == "application/json":
            json_weight = max(json_weight, weight)
        elif name.strip().startswith("image/"):
            image_weight = max(image_weight, weight)
    return json_weight > 0 and json_weight >= image_weight


def answer_json(delivery: GenerationResult, request_id: str, model: str) -> bytes:
    """The JSON answer of POST /generate (schemas.GenerateAnswer)."""
    return to_json(
        {
            "id": request_id,
            "created": int(time.time()),
            "model": model,
            "images": [
                {
                    "b64": picture.content.decode("ascii"),
                    "seed": picture.seed,
                    "width": delivery.width,
                    "height": delivery.height,
                    "format": delivery.output_format,
                }
                for picture in delivery.images
            ],
            "timings_ms": milliseconds(delivery.timings_ms),
            "prompt_truncated": delivery.prompt_truncated,
        }
    )
