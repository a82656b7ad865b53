"""Message types of WS /v1/live (docs/use/live.md)."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic_core import to_json

from engines.types import DecoderName
from server.errors import FieldError, InvalidError, RequestError
from server.generation.image_codec import MAX_IMAGE_BYTES, ImageFormat
from server.http.routes.schemas import MAX_PROMPT, Sampling
from server.http.validation import parse

SUBPROTOCOL = "sana-sprint.live.v1"
MAX_SETTINGS = 64 * 1024  # characters of a text message
MAX_DRAWING = MAX_IMAGE_BYTES

Mode = Literal["auto", "text", "image", "control"]


class LiveSettings(Sampling):
    """A client's text messages; each holds what changes. No image is generated before there is a prompt."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field("", min_length=1, max_length=MAX_PROMPT)
    output_format: ImageFormat = "jpeg"
    mode: Mode = Field("auto", description="What a drawing is: auto takes control where there is a ControlNet.")
    strength: float = Field(0.5, ge=0, le=1, description="In mode image: how far to go from the drawing.")
    control_scale: float = Field(1.0, ge=0, le=2, description="In mode control: weight of the drawing.")
    decoder: DecoderName | Literal["auto"] = Field(  # type: ignore[assignment]  # wider than the base's
        "auto", description="auto: fast while messages come, full when they rest; full alone without a second one."
    )

    def updated(self, message: str) -> "LiveSettings":
        """Returns these settings with the changes of the message. Raises InvalidError (422)."""
        if len(message) > MAX_SETTINGS:
            raise InvalidError(
                [
                    FieldError(
                        "body", f"body: got {len(message)} characters of settings, allowed: at most {MAX_SETTINGS}"
                    )
                ]
            )
        changes = parse(LiveSettings, message.encode())
        update = {name: getattr(changes, name) for name in changes.model_fields_set}
        if update.get("aspect_ratio") is not None:
            update = {"width": None, "height": None, **update}
        elif not {"width", "height"}.isdisjoint(update):
            update = {"aspect_ratio": None, **update}
        return self.model_copy(update=update)


def message(kind: Literal["ready", "picture", "error", "end"], fields: Mapping[str, Any]) -> str:
    """Returns a text message to a client."""
    return to_json({"type": kind, **fields}).decode()


def error_message(error: RequestError, sequence: int) -> str:
    """Returns the error of the client's message of that number, or of the image that it asked for."""
    fields: dict[str, Any] = {
        "sequence": sequence,
        "status": error.status,
        "code": error.code,
        "detail": error.detail,
    }
    if isinstance(error, InvalidError):
        fields["errors"] = [{"field": fault.field, "detail": fault.detail} for fault in error.field_errors]
    return message("error", fields)
