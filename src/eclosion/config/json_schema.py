"""The native config as a JSON Schema, for editors that complete and check YAML and JSON."""

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import TypeAdapter

from eclosion.config.schema import RunConfig
from eclosion.errors import MissingExtraError
from eclosion.registry import describe, names, resolve

__all__ = ["json_schema"]


def json_schema() -> dict[str, Any]:
    """The schema of the native config, draft 2020-12.

    A field that holds a part takes its name, or a mapping with the name and the options of that
    part. A part whose optional library is not installed is taken with any options.
    """
    definitions: dict[str, Any] = {}
    root: dict[str, Any] = _linked(_schema_of(RunConfig), definitions)
    definitions |= root.pop("$defs")
    root["properties"] = {"$schema": {"type": "string"}} | root["properties"]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "eclosion config"}
    return root | head | {"$defs": dict(sorted(definitions.items()))}


def _schema_of(cls: Any) -> dict[str, Any]:
    """The schema of a section or a part, its options described by the comments above its fields."""
    schema = TypeAdapter(cls).json_schema()
    _add_descriptions(schema, cls)
    for inside in _sections_in(cls):
        if inside.__name__ in schema.get("$defs", {}):
            _add_descriptions(schema["$defs"][inside.__name__], inside)
    return schema


def _sections_in(annotation: Any) -> Iterator[Any]:
    """The sections in the fields of a section, in lists and mappings of such, and so on inwards."""
    inside = (f.type for f in dataclasses.fields(annotation)) if dataclasses.is_dataclass(annotation) else ()
    for found in (*inside, *get_args(annotation)):
        if dataclasses.is_dataclass(found) and isinstance(found, type):
            yield found
        yield from _sections_in(found)


def _add_descriptions(schema: dict[str, Any], cls: Any) -> None:
    for option in describe(cls):
        schema["properties"][option.name]["description"] = option.text


def _linked(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with each mark that `PartOf` left replaced by the parts of its table, which go into definitions."""
    if isinstance(schema, list):
        return [_linked(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "part" not in schema or "unnamed" not in schema:
        return {key: _linked(value, definitions) for key, value in schema.items()}
    table, unnamed = schema["part"], schema["unnamed"]
    if table not in definitions:
        _define(table, definitions)
    kept = {key: value for key, value in schema.items() if key in ("default", "description")}
    link = {"$ref": f"#/$defs/{table}"}
    if unnamed:
        without_name = {"$ref": f"#/$defs/{table}.{unnamed}", "not": {"required": ["name"]}}
        return kept | {"oneOf": [link, without_name]}
    return kept | link


def _define(table: str, definitions: dict[str, Any]) -> None:
    """Add a table, and each of its parts as `<table>.<name>`."""
    definitions[table] = {}  # before its parts, which may hold parts themselves
    for name in names(table):
        schema = _linked(_part_schema(table, name), definitions)
        definitions |= schema.pop("$defs", {})
        schema["properties"] = {"name": {"const": name}} | schema["properties"]
        definitions[f"{table}.{name}"] = schema
    options = [{"$ref": f"#/$defs/{table}.{name}", "required": ["name"]} for name in names(table)]
    definitions[table] = {"oneOf": [{"enum": list(names(table))}, *options]}


def _part_schema(table: str, name: str) -> dict[str, Any]:
    try:
        return _schema_of(resolve(table, name))
    except MissingExtraError as error:
        return {"type": "object", "description": str(error), "properties": {}}
