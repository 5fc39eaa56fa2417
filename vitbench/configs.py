"""The base of every config: frozen, checked when it is made, with a one-line message when it is wrong."""

from typing import Any, Self

import pydantic

from vitbench.errors import InputError


class Config(pydantic.BaseModel):
    """Frozen values with declared types and ranges. A wrong key, type or range raises `InputError` when it is made."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise InputError(explain(error, type(self))) from None

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON types."""
        return self.model_dump(mode="json")

    def having(self, **changes: Any) -> Self:
        """A checked copy with some fields replaced."""
        return type(self)(**{**{key: getattr(self, key) for key in type(self).model_fields}, **changes})


def explain(error: pydantic.ValidationError, kind: type[pydantic.BaseModel]) -> str:
    """A pydantic error on one line: the key, what was given, what is allowed."""
    parts = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            parts.append(f"unknown key {key!r} (allowed: {', '.join(kind.model_fields)})")
        elif problem["type"] == "missing":
            parts.append(f"key {key!r} is missing")
        else:
            given = repr(problem["input"])
            given = given if len(given) <= 80 else given[:77] + "..."
            where = f"{key} = {given}" if key else given
            parts.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
    return f"{kind.__name__}: " + "; ".join(parts)
