"""Validates bodies against their models and words the errors."""

import difflib
import json
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.errors import FieldError, InvalidError
from server.generation.image_codec import MAX_IMAGE_BYTES

MAX_BASE64 = (
    MAX_IMAGE_BYTES * 4 // 3 + 2**20
)  # allows line breaks and a data: prefix; the codec checks the decoded size

MAX_SHOWN = 80  # characters of a bad value in an error message

Body = TypeVar("Body", bound=BaseModel)


def parse(model: type[Body], body: bytes) -> Body:
    """Returns the validated body. Raises InvalidError (422): each bad field, its value and what is allowed."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _invalid_error(model, error) from None  # pydantic's text holds prompts, which must not be logged


def parse_form(model: type[Body], fields: dict[str, str]) -> Body:
    """Returns the validated form, whose values are all text. Raises InvalidError (422)."""
    try:
        return model.model_validate(fields, strict=False)
    except ValidationError as error:
        raise _invalid_error(model, error) from None


def _invalid_error(model: type[BaseModel], error: ValidationError) -> InvalidError:
    return InvalidError([_field_error(model, detail) for detail in error.errors(include_url=False)])


def _field_error(model: type[BaseModel], error: ErrorDetails) -> FieldError:
    kind, field = error["type"], ".".join(str(part) for part in error["loc"])
    if not field:
        expected = "a JSON object" if kind == "model_type" else "valid JSON in UTF-8"
        return FieldError("body", f"body: {error['msg'][:MAX_SHOWN]}; allowed: {expected}")
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(field, model.model_fields, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return FieldError(
            field[:MAX_SHOWN], f"{field[:MAX_SHOWN]}: unknown field; {hint}allowed: {', '.join(model.model_fields)}"
        )
    received = "nothing" if kind == "missing" else excerpt(error["input"])
    return FieldError(field, f"{field}: got {received}, allowed: {allowed_values(model, field)}")


def excerpt(value: object) -> str:
    """Formats a bad value for an error message: at most MAX_SHOWN characters, or the length of a longer text."""
    if isinstance(value, str) and len(value) > MAX_SHOWN:
        return f"{len(value)} characters"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def allowed_values(model: type[BaseModel], field: str) -> str:
    """Describes the allowed values of a field, from its JSON schema."""
    schema = model.model_json_schema()["properties"][field.partition(".")[0]]
    choices = schema.get("anyOf", [schema])
    rule = schema | choices[0]  # of `x | None`, x comes first
    nullable = " or null" if len(choices) > 1 else ""
    if "enum" in rule:
        return ", ".join(map(str, rule["enum"])) + nullable
    if "pattern" in rule:
        return f"text like {rule['pattern']}{nullable}"
    if rule["type"] == "string":
        return f"a string of {rule.get('minLength', 0)} to {rule.get('maxLength', MAX_BASE64)} characters{nullable}"
    inner = rule.get("additionalProperties")
    if isinstance(inner, dict) and "minimum" in inner:
        return f"an object whose values are numbers from {inner['minimum']:g} to {inner['maximum']:g}{nullable}"
    nouns = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "array": "a list"}
    noun = {**nouns, "object": "an object"}[rule["type"]]
    if "multipleOf" in rule:
        noun += f", a multiple of {rule['multipleOf']}"
    if "maximum" in rule:
        noun += f" from {rule['minimum']} to {rule['maximum']}"
    return noun + nullable
