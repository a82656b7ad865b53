"""JSON bodies of /v1/images/edits, with the image as base64 or a data: URL. Nothing is fetched or stored."""

from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from server.errors import FieldError, InvalidError
from server.generation.generator import GenerationRequest
from server.http.routes.openai_schemas import ImageGenerationRequest
from server.http.routes.schemas import IMAGE_SCHEMA
from server.http.validation import MAX_BASE64, excerpt

ALLOWED = "one image, as base64 or as a data: URL; this server fetches nothing and keeps no files"
NO_MASK = "mask: got a mask, allowed: none; this model repaints the whole image"


class EditRequest(ImageGenerationRequest):
    """Body of /v1/images/edits in JSON: the fields of generations, and the image in `image` or `images`."""

    image: str | None = Field(
        None, max_length=MAX_BASE64, json_schema_extra=IMAGE_SCHEMA, description="Base64 or a data: URL."
    )
    images: list[Any] | None = Field(None, description='One: a text as `image`, or {"image_url": text}.')
    mask: Any = Field(None, description="None is accepted.")

    @model_validator(mode="before")
    @classmethod
    def _one_list(cls, body: Any) -> Any:
        """Moves a list or an object in `image` to `images`."""
        if isinstance(body, dict) and isinstance(body.get("image"), list | dict):
            image = body["image"]
            body = {name: value for name, value in body.items() if name != "image"}
            body["images"] = image if isinstance(image, list) else [image]
        return body

    def edit_request(self) -> GenerationRequest:
        """Returns the request of a JSON body. Raises InvalidError (422) for a mask, and without exactly one image."""
        if self.mask:
            raise InvalidError([FieldError("mask", NO_MASK)])
        images = [*(self.images or []), *([self.image] if self.image else [])]
        if len(images) != 1:
            raise InvalidError([FieldError("image", f"image: got {len(images)} images, allowed: {ALLOWED}")])
        return self.to_request(embedded_image("image", images[0]))

    def to_request(self, image: bytes | str | None = None) -> GenerationRequest:
        """Returns the request for the generator; without a size the result keeps the shape of `image`."""
        return replace(super().to_request(image), keeps_shape=True)


def embedded_image(field: str, value: object) -> str:
    """Returns the base64 or data: URL of an image. Raises InvalidError (422) about `field` for any other value."""
    if isinstance(value, dict):
        inner = value.get("image_url", value.get("url", value.get("b64_json")))
        value = inner.get("url") if isinstance(inner, dict) else inner if inner else value
    if not isinstance(value, str) or value.lower().startswith(("http:", "https:", "file:")):
        raise InvalidError([FieldError(field, f"{field}: got {excerpt(value)}, allowed: {ALLOWED}")])
    return value
