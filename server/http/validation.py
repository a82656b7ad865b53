"""Bodies held to their models, and the sentences for values outside of them."""

import difflib
import json
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.errors import Fault, InvalidError
from server.generation.image_codec import MAX_IMAGE_BYTES

MAX_BASE64 = MAX_IMAGE_BYTES * 4 // 3 + 2**20  # room for line breaks and a data: prefix; the codec counts bytes

SHOWN = 80  # characters of a bad value that an error repeats

Body = TypeVar("Body", bound=BaseModel)


def parse(model: type[Body], body: bytes) -> Body:
    """The validated body. Raises InvalidError (422) that names each bad field, its value and what is allowed."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _refused(model, error) from None  # its text repeats prompts, and a log must not


def parse_form(model: type[Body], fields: dict[str, str]) -> Body:
    """As `parse`, of a form, where every value is text."""
    try:
        return model.model_validate(fields, strict=False)
    except ValidationError as error:
        raise _refused(model, error) from None


def _refused(model: type[BaseModel], error: ValidationError) -> InvalidError:
    return InvalidError([_fault(model, detail) for detail in error.errors(include_url=False)])


def _fault(model: type[BaseModel], error: ErrorDetails) -> Fault:
    kind, field = error["type"], ".".join(str(part) for part in error["loc"])
    if not field:
        expected = "a JSON object" if kind == "model_type" else "valid JSON in UTF-8"
        return Fault("body", f"body: {error['msg'][:SHOWN]}; allowed: {expected}")
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(field, model.model_fields, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return Fault(field[:SHOWN], f"{field[:SHOWN]}: unknown field; {hint}allowed: {', '.join(model.model_fields)}")
    got = "nothing" if kind == "missing" else shown(error["input"])
    return Fault(field, f"{field}: got {got}, allowed: {allowed(model, field)}")


def shown(value: object) -> str:
    """A bad value as an error repeats it: short, and long text by its length alone."""
    if isinstance(value, str) and len(value) > SHOWN:
        return f"{len(value)} characters"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def allowed(model: type[BaseModel], field: str) -> str:
    """What a field may be, in words, from its JSON schema."""
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
