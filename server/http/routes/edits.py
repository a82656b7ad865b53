"""The JSON form of OpenAI's edits: images as URLs that hold them. Nothing is fetched, and no file is known by an id."""

from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from server.errors import Fault, InvalidError
from server.generation.generator import GenerationRequest
from server.http.routes.openai_schemas import ImageGenerationRequest
from server.http.routes.schemas import IMAGE_SCHEMA
from server.http.validation import MAX_BASE64, shown

ALLOWED = "one image, as base64 or as a data: URL; this server fetches nothing and keeps no files"
NO_MASK = "mask: got a mask, allowed: none; this model repaints the whole image"


class EditRequest(ImageGenerationRequest):
    """Body of /v1/images/edits in JSON: that of generations, and the image in `image` or `images`."""

    image: str | None = Field(
        None, max_length=MAX_BASE64, json_schema_extra=IMAGE_SCHEMA, description="Base64 or a data: URL."
    )
    images: list[Any] | None = Field(None, description='One: a text as `image`, or {"image_url": text}.')
    mask: Any = Field(None, description="None is taken.")

    @model_validator(mode="before")
    @classmethod
    def _one_list(cls, body: Any) -> Any:
        """`image` may be what `images` is."""
        if isinstance(body, dict) and isinstance(body.get("image"), list | dict):
            image = body["image"]
            body = {name: value for name, value in body.items() if name != "image"}
            body["images"] = image if isinstance(image, list) else [image]
        return body

    def edit(self) -> GenerationRequest:
        """Raises InvalidError (422) unless there is exactly one image, and no mask."""
        if self.mask:
            raise InvalidError([Fault("mask", NO_MASK)])
        given = [*(self.images or []), *([self.image] if self.image else [])]
        if len(given) != 1:
            raise InvalidError([Fault("image", f"image: got {len(given)} images, allowed: {ALLOWED}")])
        return self.to_request(embedded("image", given[0]))

    def to_request(self, image: bytes | str | None = None) -> GenerationRequest:
        """As of generations; without a size the picture keeps the shape of its image."""
        return replace(super().to_request(image), keeps_shape=True)


def embedded(field: str, given: object) -> str:
    """The text that holds an image. Raises InvalidError (422) that names `field` where it is elsewhere."""
    if isinstance(given, dict):
        inner = given.get("image_url", given.get("url", given.get("b64_json")))
        given = inner.get("url") if isinstance(inner, dict) else inner if inner else given
    if not isinstance(given, str) or given.lower().startswith(("http:", "https:", "file:")):
        raise InvalidError([Fault(field, f"{field}: got {shown(given)}, allowed: {ALLOWED}")])
    return given
