"""Configs that check themselves, reading of YAML and JSON as plain data, and the digest that names both by content.

A config is frozen and checked when it is made; its error is one line. Files are read as text, numbers, true, false, null,
lists, and mappings with text keys, without dates, bytes and objects. The number and depth of values are bounded before any
is built. An alias counts as all values that it stands for, so a small file cannot become a large value.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Self

import pydantic
import yaml

from vitbench.base.errors import InputError


class Config(pydantic.BaseModel):
    """Frozen values with declared types and ranges. A wrong key, type or range raises `InputError` when it is made."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise InputError(format_validation_error(error, type(self))) from None

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON types."""
        return self.model_dump(mode="json")

    def replace(self, **changes: Any) -> Self:
        """A checked copy with some fields replaced."""
        return type(self)(**{**{key: getattr(self, key) for key in type(self).model_fields}, **changes})


def format_validation_error(error: pydantic.ValidationError, config_class: type[pydantic.BaseModel]) -> str:
    """A pydantic error as one line: the key, its value and what is allowed."""
    parts = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            parts.append(f"unknown key {key!r} (allowed: {', '.join(config_class.model_fields)})")
        elif problem["type"] == "missing":
            parts.append(f"key {key!r} is missing")
        else:
            shown_value = repr(problem["input"])
            shown_value = shown_value if len(shown_value) <= 80 else shown_value[:77] + "..."
            text = f"{key} = {shown_value}" if key else shown_value
            parts.append(f"{text}: {problem['msg'].removeprefix('Value error, ')}")
    return f"{config_class.__name__}: " + "; ".join(parts)


MAX_BYTES = 400_000  # of a file of settings
MAX_VALUES = 20_000  # of a file of settings, with aliases written out
MAX_DEPTH = 40
MAX_JSON_BYTES = 64_000_000  # manifests and results of other devices hold samples
ALLOWED = "allowed are text, numbers, true, false, null, lists, and mappings with text keys"
_INT = r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)"  # 010 and 1:30 stay text
_FLOAT = (
    r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_BOOL = r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
_SCALARS = {"null": r"~|null|Null|NULL|", "bool": _BOOL, "int": _INT, "float": _FLOAT, "merge": "<<"}
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in (*_SCALARS, "str", "seq", "map")}


class _InvalidYaml(Exception):
    """A problem in a YAML text, with the mark of its position: `line` and `column` from 0."""

    def __init__(self, problem: str, mark: Any):
        super().__init__(problem)
        self.mark = mark


class _Loader(yaml.SafeLoader):
    """The safe loader with bounds, and without dates, bytes, sets and objects."""

    yaml_implicit_resolvers = {  # noqa: RUF012  a date stays text
        None: [(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{form})$")) for kind, form in _SCALARS.items()]
    }

    def __init__(self, text: str):
        super().__init__(text)
        self.values, self.depth, self.max_depth = 0, 0, 0
        self.node_sizes: dict[int, tuple[int, int]] = {}  # node id -> its number of values and its depth

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self.node_sizes:
                raise _InvalidYaml(f"the alias *{event.anchor} refers to a value that contains it", event.start_mark)
            self._count(*self.node_sizes[id(node)], event)
            return node
        values_before, outer_depth, self.max_depth = self.values, self.max_depth, self.depth
        self._count(1, 1, event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        self.node_sizes[id(node)] = self.values - values_before, self.max_depth - self.depth
        self.max_depth = max(outer_depth, self.max_depth)
        if node.tag not in _TAGS:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise _InvalidYaml(f"a value has the type {_truncated(kind)}; {ALLOWED}", node.start_mark)
        return node

    def _count(self, more: int, height: int, event: yaml.Event) -> None:
        self.values += more
        self.max_depth = max(self.max_depth, self.depth + height)
        if self.max_depth > MAX_DEPTH:
            raise _InvalidYaml(f"values are nested more than {MAX_DEPTH} deep", event.start_mark)
        if self.values > MAX_VALUES:
            raise _InvalidYaml(f"more than {MAX_VALUES:,} values, aliases written out", event.start_mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, OverflowError, KeyError, IndexError):  # too many digits, or an explicit tag on other text
            raise _InvalidYaml(
                f"{_truncated(node.value)} is not a valid {node.tag.rpartition(':')[2]}", node.start_mark
            ) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise _InvalidYaml(f"{_truncated(node.value)} is not a finite number", node.start_mark)
        if isinstance(value, str) and not _is_text(value):
            raise _InvalidYaml(f"{_truncated(value)} has a lone surrogate, which is no character", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[str, Any]:
        seen_keys = set()
        for key, _ in node.value:  # keys of a merge (<<) may repeat
            if key.tag.endswith(":merge"):
                continue
            name = self.construct_object(key, deep=True) if isinstance(key, yaml.ScalarNode) else None
            if not isinstance(name, str):
                shown_key = _truncated(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise _InvalidYaml(f"the key {shown_key} is not text; write it in quotes", key.start_mark)
            if name in seen_keys:
                raise _InvalidYaml(f"the key {_truncated(name)} is repeated", key.start_mark)
            seen_keys.add(name)
        return super().construct_mapping(node, deep=True)


def yaml_value(text: str, source: str) -> Any:
    """The value of a YAML text; None if it is empty.

    Args:
        source: the file or setting that the text comes from, for the error.

    Raises:
        InputError: not valid YAML, a value that JSON does not have, a key that is not text or is repeated, a number that
            is not finite, or a bound is exceeded; the message gives line and column.
    """
    if len(text) > MAX_BYTES:
        raise InputError(f"{source} has {len(text):,} characters; at most {MAX_BYTES:,} are allowed")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except _InvalidYaml as error:
        raise InputError(f"{source}{_position(error.mark)}: {error}") from None
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        position = _position(getattr(error, "problem_mark", None))
        raise InputError(f"{source}{position}: not valid YAML ({' '.join(str(reason).split())[:160]})") from None


def read_yaml(path: str | Path, description: str) -> Any:
    """The value of a YAML file, read as in `yaml_value`; `description` names the kind of file in the error."""
    return yaml_value(_text(path, description, MAX_BYTES), f"{description} {str(path)!r}")


def json_value(text: str | bytes, source: str) -> Any:
    """The value of a JSON text, with the rules and errors of `yaml_value`."""

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs_seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in pairs_seen:
                raise ValueError(f"the key {_truncated(key)} is repeated")
            pairs_seen[key] = value
        return pairs_seen

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{_truncated(text)} is not a finite number")
        return value

    try:
        value = json.loads(text, object_pairs_hook=mapping, parse_constant=number, parse_float=number)
    except RecursionError:
        raise InputError(f"{source}: values are nested too deep") from None
    except ValueError as error:  # includes errors of UTF-8 and of JSON
        raise InputError(f"{source}: not valid JSON ({' '.join(str(error).split())[:160]})") from None
    return check_plain_data(value, source)


def read_json(path: str | Path, description: str) -> Any:
    """The value of a JSON file, read as in `json_value`; `description` names the kind of file in the error."""
    return json_value(_text(path, description, MAX_JSON_BYTES), f"{description} {str(path)!r}")


def check_plain_data(value: Any, source: str, depth: int = 0) -> Any:
    """Return `value` if it consists of plain data only; `source` names it in the error.

    Raises:
        InputError: a value of another type, a key that is not text, a number that is not finite, or nesting too deep.
    """
    if depth > MAX_DEPTH:
        raise InputError(f"{source}: values are nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise InputError(f"{source}: the key {_truncated(key)} is not text; {ALLOWED}")
            check_plain_data(key, source, depth)
            check_plain_data(inner, source, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_plain_data(inner, source, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{source}: {value} is not a finite number")
    elif type(value) is str and not _is_text(value):
        raise InputError(f"{source}: {_truncated(value)} has a lone surrogate, which is no character")
    elif not (value is None or type(value) in (str, bool, int, float)):
        raise InputError(f"{source}: a value has the type {type(value).__name__!r}; {ALLOWED}")
    return value


def _text(path: str | Path, description: str, max_bytes: int) -> str:
    path = Path(path).expanduser()
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"{description} {str(path)!r} cannot be read ({error.strerror})") from None
    if len(content) > max_bytes:
        raise InputError(f"{description} {str(path)!r} is too large; at most {max_bytes:,} bytes are allowed")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{description} {str(path)!r}, line {line}: not UTF-8; save it in UTF-8") from None


def _position(mark: Any) -> str:
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _is_text(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text) if not text.isascii() else True


def _truncated(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hex digits of the SHA-256 of a value of JSON's types; the order of mappings does not matter.

    Keys of committed rows and names of cells are such digests, so the hashed text must never change.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]
