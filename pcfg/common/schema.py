"""JSON files with a schema: pydantic models whose errors name the file, the field, the value and what to do."""

import json
from typing import TypeVar

import pydantic

from pcfg.common.files import AnyPath, InputError, read_json, write_json


class Schema(pydantic.BaseModel):
    """Base of all JSON schemas of the project: no NaN or infinity, no silent conversion of types."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", frozen=True)


AnySchema = TypeVar("AnySchema", bound=Schema)


def parse_schema(schema: type[AnySchema], content: dict, source: object, advice: str) -> AnySchema:
    """The object of a schema in the content of the JSON file `source`; `advice`: what a user can do about a damaged one."""
    try:
        # As JSON again: in strict mode a Python list is no tuple, but a JSON array is.
        return schema.model_validate_json(json.dumps(content))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the whole object"
        value = "" if first["type"] == "missing" else f", not {first['input']!r:.60}"
        more = error.error_count() - 1
        others = f" (and {more} more)" if more else ""
        raise InputError(f"{source}: {field!r}: {first['msg']}{value}{others}; {advice}") from None


def read_schema(schema: type[AnySchema], path: AnyPath, advice: str) -> AnySchema:
    """The object of a schema in a JSON file; arguments as in `parse_schema`."""
    return parse_schema(schema, read_json(path), path, advice)


def write_schema(path: AnyPath, value: Schema) -> None:
    """Write an object of a schema as JSON, atomically, its fields in the order of their definition."""
    write_json(path, value.model_dump(mode="json"))
