"""Fields of requests in JSON, as every API's models have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from slipstream.server.core.limits import MAX_FIELDS

T = TypeVar("T")

# Null stands for a field left out, as in OpenAI's client.
Flag = Annotated[bool, Field(strict=True)] | None
Int = Annotated[int, Field(strict=True)]
Float = Annotated[float, Field(strict=True)] | None
# The first wrong element ends the check of a list: the errors of a million of them are dear.
Several = Annotated[list[T], Field(fail_fast=True)]
# What has no effect on an answer is taken and not looked at.
Ignored = Annotated[Any, Field(description="Accepted for OpenAI's clients; has no effect.")]


@dataclass(frozen=True)
class _Only:
    """Fields of which this server can do nothing but what these values say."""

    accepted: tuple[object, ...]
    remedy: str = "leave it out"

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {**handler(schema), "enum": [None, *self.accepted]}

    def _check(self, value: object) -> object:
        if value is None or value in self.accepted:
            return value
        raise PydanticCustomError("unsupported", f"not supported by this server; {self.remedy}")


def only(*accepted: object, remedy: str = "leave it out") -> _Only:
    """The mark of a field that takes null and these values only."""
    return _Only(accepted, remedy)


class Strict(BaseModel):
    """A model that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _of_few_fields(cls, values: Any) -> Any:  # noqa: ANN401 - JSON
        if isinstance(values, dict) and len(values) > MAX_FIELDS:
            fields = cls.model_fields
            known = {name: value for name, value in values.items() if name in fields}
            unknown = next(name for name in values if name not in fields)
            return {**known, unknown: values[unknown]}  # one says enough
        return values
