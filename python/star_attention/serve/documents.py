"""The API's description, /openapi.json."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def request_schema(model: type[BaseModel]) -> dict[str, Any]:
    """What FastAPI says of a body that it does not read itself."""
    schema = model.model_json_schema(
        ref_template=f"#/components/schemas/{model.__name__}.{{model}}"
    )
    schema = _inlined(schema, schema.pop("$defs", {}), model.__name__)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(value: Any, definitions: dict[str, Any], name: str) -> Any:
    """Definitions stand where they are used: none of ours contains itself."""
    if isinstance(value, list):
        return [_inlined(each, definitions, name) for each in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _inlined(definitions[value["$ref"].rpartition(f"{name}.")[2]], definitions, name)
    return {key: _inlined(each, definitions, name) for key, each in value.items()}
