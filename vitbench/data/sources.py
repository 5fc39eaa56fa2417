"""Labelled images from scikit-learn's digits, the Hugging Face hub or a local folder.

Images are held in memory as pixels, or stay encoded in files or in cells of a table.
"""

import glob
import hashlib
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vitbench.base import hub, paths, progress
from vitbench.base.errors import InputError, one_of
from vitbench.data import folders, labels, listed, parquet
from vitbench.data.decoding import DecodeError, decode, decoding_note

MAX_IN_MEMORY_SIDE = 64  # images up to this side are decoded once and held in memory
MAX_HASHED_IMAGES = 5_000  # of a larger encoded set, this many evenly spaced images are hashed, and the sizes of all


class Images(Protocol):
    """A sequence of RGB images with a hash of their content. `location` names an image's file or row in errors."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Image.Image: ...

    def location(self, i: int) -> str: ...

    def content_hash(self) -> str: ...


class ArrayImages:
    """Small images held in memory as uint8 (N, H, W, 3)."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> Image.Image:
        return Image.fromarray(self.array[i])

    def location(self, i: int) -> str:
        """The image's number, since its file is no longer known."""
        return f"image {i}"

    def content_hash(self) -> str:
        """SHA-256 of the pixels."""
        return hashlib.sha256(str(self.array.shape).encode() + self.array.tobytes()).hexdigest()


class EncodedImages(ABC):
    """Images that stay encoded and are decoded at each access. Subclasses read the bytes."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def location(self, i: int) -> str:
        """The file or the row of image `i`."""

    @abstractmethod
    def encoded(self, i: int) -> bytes:
        """The bytes of image `i`; raises `DecodeError` or `OSError` if they cannot be read."""

    @abstractmethod
    def sizes(self) -> np.ndarray:
        """The number of bytes of each image, (N,) int64, without reading the images."""

    @abstractmethod
    def subset(self, indices: np.ndarray) -> "EncodedImages":
        """The images at these indices."""

    def __getitem__(self, i: int) -> Image.Image:
        try:
            return decode(self._bytes(i))
        except DecodeError as reason:
            raise self._broken(i, reason) from None

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[i] for i in range(len(self)))

    def broken(self) -> list[int]:
        """Indices of the images that cannot be decoded; every image is decoded once."""
        return [
            i for i in progress.progress_bar(range(len(self)), "looking for broken images") if not self._is_decodable(i)
        ]

    def content_hash(self) -> str:
        """SHA-256 of the encoded images and of their decoding notes, as `decoding_note` gives them."""
        digest = hashlib.sha256(str(len(self)).encode())
        step = max(1, len(self) // MAX_HASHED_IMAGES)
        notes = []
        for i in range(0, len(self), step):
            try:
                encoded = self._bytes(i)
            except DecodeError as reason:
                raise self._broken(i, reason) from None
            digest.update(encoded)
            if note := decoding_note(encoded):
                notes.append(f"{i} {note}")
        if notes:
            digest.update("\n".join(notes).encode())
        if step > 1:
            digest.update(self.sizes().astype("<i8").tobytes())
        return digest.hexdigest()

    def _bytes(self, i: int) -> bytes:
        try:
            return self.encoded(i)
        except OSError as error:
            raise DecodeError(error.strerror or str(error)) from None

    def _is_decodable(self, i: int) -> bool:
        try:
            decode(self._bytes(i))
        except DecodeError:
            return False
        return True

    def _broken(self, i: int, reason: DecodeError) -> InputError:
        return InputError(
            f"{self.location(i)}: the image cannot be read ({reason}); repair it, take it out, or leave such images out with "
            f"skip_broken=True (on the command line: --splits skip_broken=true)"
        )


class FileImages(EncodedImages):
    """Images in files, one file each."""

    def __init__(self, paths: Iterable[Path]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def location(self, i: int) -> str:
        """The file's path."""
        return str(self.paths[i])

    def encoded(self, i: int) -> bytes:
        """The file's content."""
        return _read(self.paths[i])

    def sizes(self) -> np.ndarray:
        """The sizes of the files."""
        return np.array([path.stat().st_size for path in self.paths], dtype=np.int64)

    def subset(self, indices: np.ndarray) -> "FileImages":
        """The files at these indices."""
        return FileImages(self.paths[i] for i in indices)


class TableImages(EncodedImages):
    """Images in a column of a `datasets` table.

    Args:
        table: the table.
        column: the name of the image column.
        files: the files or tables that the table was read from, in order, each with its number of rows.
        rows: the rows of the table to use, (N,); None uses all.
    """

    def __init__(self, table: Any, column: str, files: Sequence[tuple[str, int]], rows: np.ndarray | None = None):
        from datasets import Image as ImageFeature

        self.column, self.files = column, list(files)
        self.table = table.select_columns([column]).cast_column(column, ImageFeature(decode=False))
        self.rows = np.arange(len(table)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def location(self, i: int) -> str:
        """The file or table, and the row in it."""
        row = int(self.rows[i])
        for name, count in self.files:
            if row < count:
                return f"{name}, row {row} (the first is 0)"
            row -= count
        raise IndexError(i)

    def encoded(self, i: int) -> bytes:
        """The cell's bytes, or the content of the file that the cell names."""
        return self._content(self.table[int(self.rows[i])][self.column])

    @staticmethod
    def _content(cell: dict[str, Any] | None) -> bytes:
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise DecodeError("the cell is empty")
        return cell["bytes"] if cell["bytes"] is not None else _read(Path(cell["path"]))

    def sizes(self) -> np.ndarray:
        """The sizes of the cells; 0 where a cell names a file."""
        import pyarrow.compute as pc

        flat_table = self.table.flatten_indices() if self.table._indices is not None else self.table
        cells = flat_table.data.column(self.column)
        lengths = pc.fill_null(pc.binary_length(pc.struct_field(cells, "bytes")), 0).to_numpy()
        return lengths.astype(np.int64)[self.rows]

    def subset(self, indices: np.ndarray) -> "TableImages":
        """The rows at these indices."""
        return TableImages(self.table, self.column, self.files, self.rows[indices])


def _read(path: Path) -> bytes:
    if not path.is_file():  # reading a pipe or a device may never end
        raise DecodeError(f"{str(path)!r} is not a file")
    return path.read_bytes()


def in_memory(images: EncodedImages) -> Images:
    """Decode the images once and hold them in memory, if they are small and of one size; otherwise return them as given."""
    if max(images[0].size) > MAX_IN_MEMORY_SIDE:
        return images
    shape = np.asarray(images[0]).shape
    array = np.empty((len(images), *shape), dtype=np.uint8)
    for i, image in enumerate(images):
        pixels = np.asarray(image)
        if pixels.shape != shape:
            return images
        array[i] = pixels
    return ArrayImages(array)


@dataclass
class LabelledImages:
    """The images of one split with their labels.

    Attributes:
        images: the images that are used.
        labels: indices into the class names, (N,) int64.
        total: how many images were found.
        skipped: reasons why images are not used, with counts.
    """

    images: Images
    labels: np.ndarray
    total: int
    skipped: Counter = field(default_factory=Counter)


@dataclass
class ImageSet:
    """An image set: its splits (train, val, test), its class names, and the layout that was recognised, in words."""

    parts: dict[str, LabelledImages]
    classes: tuple[str, ...]
    layout: str

    def describe(self) -> str:
        """One line: the layout, the classes, and how many images each split found, used and skipped."""
        class_names = ", ".join(self.classes[:6]) + (", ..." if len(self.classes) > 6 else "")
        lines = [f"{self.layout}; {len(self.classes)} classes ({class_names})"]
        for name, part in self.parts.items():
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(part.skipped.items()))
            skipped = sum(part.skipped.values())
            lines.append(
                f"{name}: {part.total} images found, {len(part.labels)} used, {skipped} skipped"
                + (f" ({reasons})" if reasons else "")
            )
        train = self.parts.get("train")
        if train is not None and len(self.parts) > 1:
            missing_classes = sorted(set(range(len(self.classes))) - set(train.labels.tolist()))
            if missing_classes:
                missing_names = ", ".join(self.classes[i] for i in missing_classes[:6]) + (
                    ", ..." if len(missing_classes) > 6 else ""
                )
                lines.append(f"without a train image: {missing_names}")
        return "; ".join(lines)


@dataclass
class _Group:
    """The images of one split and their label columns; `skipped` counts files that are not among the images, by reason."""

    images: EncodedImages
    columns: list[labels.Column]
    skipped: Counter = field(default_factory=Counter)


def read_digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits (UCI ML), 8 x 8 pixels, grey converted to RGB."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    array = np.repeat(grey[..., None], 3, axis=3)
    part = LabelledImages(ArrayImages(array), digits.target.astype(np.int64), len(array))
    return ImageSet({"train": part}, tuple("0123456789"), "built in")


def open_images(name_or_path: str | Path, label: str, skip_broken: bool = False) -> ImageSet:
    """Open a folder or a Hugging Face set. Image and label columns are found by their types.

    A split whose labels are all missing or -1 is left out. With `skip_broken`, all images are decoded once, and those
    that cannot be decoded are left out.

    Raises:
        InputError: no such set, no images, no labels, labels that are not classes, or an image that cannot be read.
    """
    name = str(name_or_path)
    folder = Path(name).expanduser()
    is_path = folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    if is_path and not folder.is_dir():
        raise InputError(f"dataset folder {name!r} does not exist; give 'digits', a Hugging Face name or a folder")
    if not is_path or (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        groups, layout = _from_tables(_load_tables(name, is_path), name, label)
    elif files := [file for file in parquet.parquet_files(folder) if file.name not in listed.FILES]:
        groups, layout = _from_parquet(folder, files, label)
    else:
        groups, layout = _from_folders(folder, label)
    groups = {split: groups[split] for split in ("train", "val", "test") if split in groups}
    classes, values = labels.encode({split: group.columns for split, group in groups.items()})
    parts, unlabelled = {}, []
    for split, group in groups.items():
        if (set_labels := values[split]) is None:
            unlabelled.append(f"{split}: {len(group.images)} images without labels, not used")
            continue
        parts[split] = _part(group, set_labels, skip_broken)
    if not parts:
        raise InputError(f"{name} has no images with labels ({'; '.join(unlabelled) or layout}); give it labels")
    return ImageSet(parts, classes, "; ".join([layout, *unlabelled]))


def _part(group: _Group, set_labels: np.ndarray, skip_broken: bool) -> LabelledImages:
    images, skipped, total = group.images, group.skipped.copy(), len(group.images) + sum(group.skipped.values())
    if skip_broken and (broken := images.broken()):
        readable = np.setdiff1d(np.arange(len(images)), broken)
        if not len(readable):
            raise InputError(f"{images.location(0)}: neither this nor any other of {len(images)} images can be read")
        images, set_labels = images.subset(readable), set_labels[readable]
        skipped["broken"] += len(broken)
    return LabelledImages(in_memory(images), set_labels, total, skipped)


def _from_folders(root: Path, label: str) -> tuple[dict[str, _Group], str]:
    """Folders of image files, listed in a table or sorted into class folders."""
    table_of_all = listed.find_metadata_table(root)
    tables = {"": table_of_all} if table_of_all else _metadata_tables_of_splits(root)
    groups: dict[str, _Group] = {}
    for split, table in tables.items():
        for name, (files, column, unlisted) in (listed.read_metadata_table(table, label) or {}).items():
            skipped = Counter({f"not in {table.name}": unlisted} if unlisted else {})
            groups[split or name] = _Group(FileImages(files), [column], skipped)
    if groups:
        return groups, f"images and labels are those of {', '.join(str(table) for table in tables.values())}"
    if label:
        one_of("label column", label, ["label"])  # class folders have no columns
    class_folders, layout = folders.read_folders(root)
    for split, group in class_folders.items():
        groups[split] = _Group(FileImages(group.files), [labels.Column(str(root), group.labels)], group.skipped)
    return groups, layout


def _metadata_tables_of_splits(root: Path) -> dict[str, Path]:
    """The metadata tables of the sub-folders, if every sub-folder has a split's name and a table; otherwise empty."""
    subfolders = [path for path in sorted(root.iterdir()) if path.is_dir() and not folders.is_hidden(path.name)]
    tables = {}
    for path in subfolders:
        if table := listed.find_metadata_table(path):
            tables[folders.SPLITS.get(path.name.lower(), "")] = table
    return tables if all(tables) and len(tables) == len(subfolders) else {}


def _from_parquet(root: Path, files: list[Path], label: str) -> tuple[dict[str, _Group], str]:
    import datasets

    splits, unassigned = parquet.by_split(root, files)
    first = next(iter(splits.values()))[0]
    schema = parquet.schema_of(first)
    column = parquet.image_column(schema, lambda name: parquet.first_value(first, name), str(first))
    label_column = parquet.label_column(schema, label, str(first))
    labels_by_split = {
        split: [parquet.labels_of(file, label_column) for file in group] for split, group in splits.items()
    }
    for group in splits.values():
        for file in group:
            one_of(f"image column of {file}:", column, parquet.schema_of(file).names)
    show_bars = sys.stderr.isatty() or datasets.are_progress_bars_disabled()  # a lesson and a log would keep each bar
    try:
        if not show_bars:
            datasets.disable_progress_bars()
        tables = datasets.load_dataset(
            "parquet",
            data_files={split: [glob.escape(str(file.resolve())) for file in group] for split, group in splits.items()},
            columns=[column],
            features=datasets.Features({column: datasets.Image(decode=False)}),
            cache_dir=str(paths.data_cache()),
        )
    except Exception as error:  # the library raises many types, some its own
        raise InputError(f"the folder {str(root)!r} could not be read as an image set: {_reason(error)}") from error
    finally:
        if not show_bars:
            datasets.enable_progress_bars()
    groups = {}
    for split, columns in labels_by_split.items():
        counts = [(labelled.source, len(labelled.values)) for labelled in columns]
        groups[split] = _Group(TableImages(tables[split], column, counts), columns)
    layout = f"parquet, images in {column!r}, labels in {label_column!r}"
    splits_text = "; ".join(
        f"{split} is {_first_names([file.name for file in group])}" for split, group in splits.items()
    )
    unread_text = (
        f"; not read, as their names say no split: {_first_names([file.name for file in unassigned])}"
        if unassigned
        else ""
    )
    loose_images = sum(1 for _ in folders.find_images(root))
    return groups, f"{layout}; {splits_text}{unread_text}" + (
        f"; {loose_images} image files beside them are not read" if loose_images else ""
    )


def _from_tables(tables: Mapping[str, Any], name: str, label: str) -> tuple[dict[str, _Group], str]:
    """Tables of the `datasets` library, by split."""
    first = next(iter(tables.values()))
    schema = first.features.arrow_schema
    column = parquet.image_column(schema, lambda key: next((v for v in first[key][:16] if v is not None), None), name)
    label_column = parquet.label_column(schema, label, name)
    groups, unread_splits = {}, []
    for key, table in tables.items():
        split = parquet.SPLIT_WORDS.get(key.lower())
        if split is None or split in groups:
            unread_splits.append(key)
            continue
        source = f"{name}, split {key}"
        one_of(f"label column of {source}:", label_column, table.column_names)
        names = parquet.class_names(table.features.arrow_schema, label_column)
        images = TableImages(table, column, [(source, len(table))])
        groups[split] = _Group(images, [labels.Column(source, list(table[label_column]), names)])
    if not groups:
        raise InputError(f"{name} has splits {', '.join(tables)} but none named train, val or test with labels")
    layout = f"images in {column!r}, labels in {label_column!r}"
    return groups, layout + (f"; splits that are not read: {', '.join(unread_splits)}" if unread_splits else "")


def _load_tables(name: str, is_path: bool) -> dict[str, Any]:
    import datasets

    if is_path:
        try:
            loaded = datasets.load_from_disk(str(Path(name).expanduser()))
        except Exception as error:  # the library raises many types, some its own
            raise InputError(f"the folder {name!r} could not be read as an image set: {_reason(error)}") from error
    else:
        description = f"unknown dataset {name!r}: it is neither 'digits' nor a folder; the hub's image set of that name"
        with hub.fetching(description, "give a local folder"):
            loaded = datasets.load_dataset(name, cache_dir=str(paths.data_cache()))
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
