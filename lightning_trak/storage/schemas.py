"""Schemas: checks of JSON from a file, before any of it is used.

A schema is a function of a field's name and its value. If the value is not allowed, it raises a ValueError that names
both.
"""

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

Schema = Callable[[str, Any], None]

_TOP = "it"  # the name of the whole content in errors


def parse_json(content: bytes, schema: Schema) -> Any:
    """The JSON in a file's content.

    Raises:
        ValueError: if the content is not JSON in UTF-8, has a key twice, has a number that is not finite, or is not
            allowed by the schema. The error says what is wrong.
    """
    try:
        value = json.loads(
            content.decode(), object_pairs_hook=_unique, parse_constant=_refused_number, parse_float=_finite
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    schema(_TOP, value)
    return value


def as_json(value: Any) -> Any:
    """A value as JSON gives it back: tuples become lists, and numbers that are not finite become their names."""
    return json.loads(json.dumps(value), parse_constant=str)


def are_same(one: Any, other: Any) -> bool:
    """Whether two values in JSON's types are the same, with the same types: 1, 1.0 and true are different."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def _refused_number(name: str) -> float:
    raise ValueError(f"it holds {name}, which is not a number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refused_number(digits)


def _require(fits: bool, field: str, expected: str, value: Any) -> None:
    if not fits:
        raise ValueError(f"{field} must be {expected}, got {reprlib.repr(value)}")


def anything(field: str, value: Any) -> None:
    """Any value."""


def integer(low: int, high: int) -> Schema:
    """A whole number from ``low`` to ``high``. true and 1.0 are not whole numbers here."""

    def check(field: str, value: Any) -> None:
        _require(type(value) is int and low <= value <= high, field, f"a whole number from {low} to {high}", value)

    return check


def number(low: float, high: float) -> Schema:
    """A number from ``low`` to ``high``, whole or not."""

    def check(field: str, value: Any) -> None:
        _require(type(value) in (int, float) and low <= value <= high, field, f"a number from {low} to {high}", value)

    return check


def boolean(field: str, value: Any) -> None:
    """True or false."""
    _require(isinstance(value, bool), field, "true or false", value)


def text(pattern: str = r"(?s:.*)", expected: str = "a text") -> Schema:
    """A string that matches a whole pattern. ``expected`` describes the pattern in errors."""

    def check(field: str, value: Any) -> None:
        _require(isinstance(value, str) and re.fullmatch(pattern, value) is not None, field, expected, value)

    return check


sha256 = text(r"[0-9a-f]{64}", "a SHA-256 of 64 hexadecimal digits")


def one_of(*allowed: str) -> Schema:
    """One of a few strings."""

    def check(field: str, value: Any) -> None:
        _require(isinstance(value, str) and value in allowed, field, f"one of {', '.join(allowed)}", value)

    return check


def items(schema: Schema, least: int = 0) -> Schema:
    """A list of at least ``least`` values."""

    def check(field: str, value: Any) -> None:
        expected = "a list" if not least else f"a list of at least {least}"
        _require(isinstance(value, list) and len(value) >= least, field, expected, value)
        for number, item in enumerate(value):
            schema(f"{field}[{number}]", item)

    return check


def row(*schemas: Schema) -> Schema:
    """A list with one value for each of these schemas."""

    def check(field: str, value: Any) -> None:
        _require(isinstance(value, list) and len(value) == len(schemas), field, f"a list of {len(schemas)}", value)
        for number, (schema, item) in enumerate(zip(schemas, value, strict=True)):
            schema(f"{field}[{number}]", item)

    return check


parameters = items(row(text(), items(integer(0, 1 << 62))))  # names and shapes


def record(
    fields: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None, others: Schema | None = None
) -> Schema:
    """A JSON object.

    Args:
        fields: the fields that it must have.
        optional: the fields that it may have.
        others: the schema of all other fields; None: there must be no others.
    """
    known = {**fields, **(optional or {})}

    def check(field: str, value: Any) -> None:
        _require(isinstance(value, dict), field, "an object", value)
        missing = [name for name in fields if name not in value]
        if missing:
            raise ValueError(f"{field} lacks the field {missing[0]!r}")
        for name, found in value.items():
            schema = known.get(name, others)
            if schema is None:
                raise ValueError(f"{field} has the unknown field {reprlib.repr(name)}")
            schema(name if field == _TOP else f"{field}.{name}", found)

    return check


def versioned(version: int, schema: Schema) -> Schema:
    """Content with a ``"format"``. In another format than ``version``, nothing else of it is looked at."""
    any_version = record({"format": integer(0, 1 << 62)}, others=anything)

    def check(field: str, value: Any) -> None:
        any_version(field, value)
        if value["format"] != version:
            raise ValueError(f"it has format {value['format']}, but this version reads format {version}")
        schema(field, value)

    return check


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Content with its own checksum, as :func:`sealed` expects."""
    return content | {"checksum": json_digest(content)}


def sealed(fields: Mapping[str, Schema], others: Schema | None = None) -> Schema:
    """A :func:`record` with the checksum of :func:`with_checksum`, which must match its content."""
    schema = record({**fields, "checksum": sha256}, others=others)

    def check(field: str, value: Any) -> None:
        schema(field, value)
        if value["checksum"] != json_digest({name: found for name, found in value.items() if name != "checksum"}):
            raise ValueError("its checksum does not match its content")

    return check


def json_digest(content: Any) -> str:
    """SHA-256 of content in JSON's types."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
