"""Parquet files of images and labels, written by any program: their splits, and their image and label columns."""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitbench.base.errors import InputError, one_of
from vitbench.data.decoding import is_image
from vitbench.data.folders import SPLITS, is_hidden
from vitbench.data.labels import Column

SPLIT_WORDS = {**SPLITS, "dev": "val", "evaluation": "test"}  # in names of files and of the splits of tables
LABEL_NAMES = ("label", "labels", "class", "target")


def parquet_files(root: Path) -> list[Path]:
    """All parquet files below `root` that are not hidden, sorted by path."""
    files = [path for path in root.rglob("*.parquet") if path.is_file()]
    visible = [path for path in files if not any(is_hidden(part) for part in path.relative_to(root).parts)]
    return sorted(visible, key=lambda path: path.relative_to(root).as_posix())


def by_split(root: Path, files: list[Path]) -> tuple[dict[str, list[Path]], list[Path]]:
    """The files of each split, and the files that belong to no split.

    A file's split is that of the nearest folder with a split's name. Without one, a word of the file's name gives the
    split (train-00000-of-00001.parquet), in any case. If no file has a split, all files are `train`.

    Raises:
        InputError: a file's name has words of two splits, or the folder's README.md lists several sets.
    """
    if len(sets := _configurations(root)) > 1:
        raise InputError(
            f"{root / 'README.md'} lists several sets, {', '.join(sets)}; give a folder with the parquet files of one"
        )
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        groups[_split_of(root, path)].append(path)
    other = groups.pop("", [])
    if not groups:
        return {"train": other}, []
    return {split: groups[split] for split in ("train", "val", "test") if split in groups}, other


def _configurations(root: Path) -> list[str]:
    """The names of the sets in a folder copied from the Hugging Face hub, read from the head of its README.md."""
    page = root / "README.md"
    head = page.read_text(encoding="utf-8", errors="replace").split("\n---")[0] if page.is_file() else ""
    named = re.findall(r"^\s*- config_name: *(.+?)\s*$", head, re.M) if head.startswith("---") else []
    return list(dict.fromkeys(named))


def _split_of(root: Path, path: Path) -> str:
    for part in reversed(path.relative_to(root).parts[:-1]):
        if part.lower() in SPLITS:
            return SPLITS[part.lower()]
    words = {SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLIT_WORDS}
    if len(words) > 1:
        raise InputError(f"{path}: the name has words of two splits, {' and '.join(sorted(words))}; rename the file")
    return next(iter(words), "")


def schema_of(path: Path) -> Any:
    """The file's Arrow schema.

    Raises:
        InputError: it is not a parquet file, or a damaged one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} cannot be read as parquet ({_first_line(error)}); copy it again or take it out"
        ) from None


def image_column(schema: Any, first_value_of: Callable[[str], Any], name: str) -> str:
    """The column of images: declared as such (Hugging Face), or structs with `bytes`, or bytes that begin like an image.

    Args:
        first_value_of: gives the first value of a column, by name, that is not missing.
        name: the file or set, for the error.
    """
    import pyarrow as pa

    declared_columns = [key for key, feature in _features(schema).items() if feature.get("_type") == "Image"]
    structs = [field.name for field in schema if _is_image_struct(field.type)]
    binary_columns = (
        field.name
        for field in schema
        if (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))
        and is_image(first_value_of(field.name))
    )
    for candidates in (declared_columns, structs, binary_columns):
        for column in candidates:
            if column in schema.names:
                return column
    raise InputError(
        f"{name} has no image column; its columns are {', '.join(schema.names)}; allowed: encoded images (PNG, JPEG, ...) as "
        f"bytes, or structs of bytes and path"
    )


def _is_image_struct(kind: Any) -> bool:
    import pyarrow as pa

    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    inner = kind.field("bytes").type
    return pa.types.is_binary(inner) or pa.types.is_large_binary(inner)


def label_column(schema: Any, label: str, name: str) -> str:
    """The column of labels: `label` if given; otherwise the one with most class names; otherwise one of `LABEL_NAMES`."""
    if label:
        return one_of("label column", label, schema.names)
    named = {key: len(names) for key in schema.names if (names := class_names(schema, key)) is not None}
    if named:  # the finest classes, such as CIFAR-100's 100 fine classes rather than its 20 coarse ones
        return max(named, key=lambda key: named[key])
    for key in LABEL_NAMES:
        if key in schema.names:
            return key
    raise InputError(f"{name} has no label column; its columns are {', '.join(schema.names)}; give label=COLUMN")


def class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """The class names that a column's numbers index, if the schema has them; otherwise None."""
    feature = _features(schema).get(column, {})
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return tuple(map(str, names)) if names else None


def _features(schema: Any) -> dict[str, Any]:
    """The features that the `datasets` library wrote for the columns; empty in files of pandas, polars and others."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):  # not written by `datasets`: the Arrow types decide
        return {}
    if not isinstance(features, dict):
        return {}
    return {key: feature for key, feature in features.items() if isinstance(feature, dict)}


def labels_of(path: Path, column: str) -> Column:
    """The labels of a file, not yet encoded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema_of(path)
    if column not in schema.names:
        raise InputError(
            f"{path} has no column {column!r} as the other files have; its columns are {', '.join(schema.names)}"
        )
    try:
        values = pq.ParquetFile(path).read(columns=[column]).column(column).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: the column {column!r} cannot be read ({_first_line(error)})") from None
    return Column(str(path), values, class_names(schema, column))


def first_value(path: Path, column: str) -> Any:
    """The first value of a column that is not missing; None if all are missing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=16, columns=[column]):
            for value in batch.column(0).to_pylist():
                if value is not None:
                    return value
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: the column {column!r} cannot be read ({_first_line(error)})") from None
    return None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
