"""Schemas: what is written is read again, and an error names file, field, value and what to do."""

import json
import re

import pytest

from pcfg.common.files import InputError
from pcfg.common.schema import Schema, read_schema, write_schema


class Part(Schema):
    value: float


class Whole(Schema):
    name: str
    parts: dict[str, Part]
    seeds: tuple[int, ...] = ()


WHOLE = Whole(name="a", parts={"x": Part(value=0.5)}, seeds=(1, 2))


def test_what_is_written_is_read(tmp_path):
    write_schema(tmp_path / "whole.json", WHOLE)
    assert read_schema(Whole, tmp_path / "whole.json", "delete it") == WHOLE
    assert list(json.loads((tmp_path / "whole.json").read_text())) == ["name", "parts", "seeds"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"name": 3}, "'name': Input should be a valid string, not 3; delete it"),
        ({"parts": {"x": {"value": "a lot"}}}, "'parts.x.value': Input should be a valid number, not 'a lot'; delete it"),
        ({"parts": {"x": {}}}, "'parts.x.value': Field required; delete it"),
        ({"colour": "red"}, "'colour': Extra inputs are not permitted, not 'red'; delete it"),
        ({"seeds": [0.5], "name": 3}, "(and 1 more); delete it"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, damage, message):
    path = tmp_path / "whole.json"
    path.write_text(json.dumps({**WHOLE.model_dump(mode="json"), **damage}))
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: .*{re.escape(message)}"):
        read_schema(Whole, path, "delete it")
