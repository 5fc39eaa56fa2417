"""Images from scikit-learn's digits, a hub name or a local folder, as parts with labels: in memory, as files, or as table bytes."""

import glob
import hashlib
import re
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
from vitbench.data.decoding import Undecodable, decode, treatment

SMALL_SIDE = 64  # images up to this side are decoded once and held in memory
HASHED_IMAGES = 5_000  # of a larger set that stays encoded, so many evenly spaced images are hashed, and all sizes


class Images(Protocol):
    """A sequence of RGB images with a hash of their content. `where` says which file or row an image is, for errors."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Image.Image: ...

    def where(self, i: int) -> str: ...

    def content_hash(self) -> str: ...


class ArrayImages:
    """Small images held in memory as uint8 (N, H, W, 3)."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> Image.Image:
        return Image.fromarray(self.array[i])

    def where(self, i: int) -> str:
        """Its number; such images were decoded before."""
        return f"image {i}"

    def content_hash(self) -> str:
        """SHA-256 of the pixels."""
        return hashlib.sha256(str(self.array.shape).encode() + self.array.tobytes()).hexdigest()


class EncodedImages(ABC):
    """Images left encoded and decoded when asked for. Subclasses say where the bytes are."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, i: int) -> str:
        """The file or the row of image `i`."""

    @abstractmethod
    def encoded(self, i: int) -> bytes:
        """The bytes of image `i`; raises `Undecodable` or `OSError` where there are none."""

    @abstractmethod
    def sizes(self) -> np.ndarray:
        """How many bytes each image has, (N,), without reading them."""

    @abstractmethod
    def chosen(self, places: Sequence[int]) -> "EncodedImages":
        """Only the images at these places."""

    def __getitem__(self, i: int) -> Image.Image:
        try:
            return decode(self._bytes(i))
        except Undecodable as reason:
            raise self._broken(i, reason) from None

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[i] for i in range(len(self)))

    def broken(self) -> list[int]:
        """Places of the images that cannot be decoded; all are tried."""
        return [
            i for i in progress.progress_bar(range(len(self)), "looking for broken images") if not self._is_whole(i)
        ]

    def content_hash(self) -> str:
        """SHA-256 of the encoded images, and of what decoding does to them beyond Pillow's conversion."""
        digest = hashlib.sha256(str(len(self)).encode())
        step = max(1, len(self) // HASHED_IMAGES)
        treatments = []
        for i in range(0, len(self), step):
            try:
                encoded = self._bytes(i)
            except Undecodable as reason:
                raise self._broken(i, reason) from None
            digest.update(encoded)
            if special := treatment(encoded):
                treatments.append(f"{i} {special}")
        if treatments:
            digest.update("\n".join(treatments).encode())
        if step > 1:
            digest.update(self.sizes().astype("<i8").tobytes())
        return digest.hexdigest()

    def _bytes(self, i: int) -> bytes:
        try:
            return self.encoded(i)
        except OSError as error:
            raise Undecodable(error.strerror or str(error)) from None

    def _is_whole(self, i: int) -> bool:
        try:
            decode(self._bytes(i))
        except Undecodable:
            return False
        return True

    def _broken(self, i: int, reason: Undecodable) -> InputError:
        return InputError(
            f"{self.where(i)}: the image cannot be read ({reason}); repair it, take it out, or leave such images out with "
            f"skip_broken=True (on the command line: --splits skip_broken=true)"
        )


class FileImages(EncodedImages):
    """A file each."""

    def __init__(self, paths: Iterable[Path]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, i: int) -> str:
        """Its path."""
        return str(self.paths[i])

    def encoded(self, i: int) -> bytes:
        """The file's content."""
        return _read(self.paths[i])

    def sizes(self) -> np.ndarray:
        """Of the files."""
        return np.array([path.stat().st_size for path in self.paths], dtype=np.int64)

    def chosen(self, places: Sequence[int]) -> "FileImages":
        """Only the files at these places."""
        return FileImages(self.paths[i] for i in places)


class TableImages(EncodedImages):
    """A column of a `datasets` table. `files` are the names and numbers of rows of what it was read from, in order."""

    def __init__(self, table: Any, column: str, files: Sequence[tuple[str, int]], rows: np.ndarray | None = None):
        from datasets import Image as ImageFeature

        self.column, self.files = column, list(files)
        self.table = table.select_columns([column]).cast_column(column, ImageFeature(decode=False))
        self.rows = np.arange(len(table)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, i: int) -> str:
        """Its file, or table, and its row there."""
        row = int(self.rows[i])
        for name, count in self.files:
            if row < count:
                return f"{name}, row {row} (the first is 0)"
            row -= count
        raise IndexError(i)

    def encoded(self, i: int) -> bytes:
        """The cell's bytes, or the content of the file that it names."""
        return self._content(self.table[int(self.rows[i])][self.column])

    @staticmethod
    def _content(cell: dict[str, Any] | None) -> bytes:
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise Undecodable("the cell is empty")
        return cell["bytes"] if cell["bytes"] is not None else _read(Path(cell["path"]))

    def sizes(self) -> np.ndarray:
        """Of the cells; 0 where a cell names a file."""
        import pyarrow.compute as pc

        whole = self.table.flatten_indices() if self.table._indices is not None else self.table
        cells = whole.data.column(self.column)
        lengths = pc.fill_null(pc.binary_length(pc.struct_field(cells, "bytes")), 0).to_numpy()
        return lengths.astype(np.int64)[self.rows]

    def chosen(self, places: Sequence[int]) -> "TableImages":
        """Only the rows at these places."""
        return TableImages(self.table, self.column, self.files, self.rows[list(places)])


def _read(path: Path) -> bytes:
    if not path.is_file():  # a pipe or a device would be read for ever
        raise Undecodable(f"{str(path)!r} is not a file")
    return path.read_bytes()


def in_memory(images: EncodedImages) -> Images:
    """Decode small images of one size once; leave larger ones encoded."""
    if max(images[0].size) > SMALL_SIDE:
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
class Part:
    """Images and their labels (int64, indices into the class names); how many were found, and why some are not used."""

    images: Images
    labels: np.ndarray
    found: int
    skipped: Counter = field(default_factory=Counter)


@dataclass
class Opened:
    """An image set: its parts, named train / val / test, its class names, and how they were recognised, in words."""

    parts: dict[str, Part]
    classes: tuple[str, ...]
    how: str

    def describe(self) -> str:
        """One line: the classes, and of each part how many images were found, used and skipped."""
        shown = ", ".join(self.classes[:6]) + (", ..." if len(self.classes) > 6 else "")
        lines = [f"{self.how}; {len(self.classes)} classes ({shown})"]
        for name, part in self.parts.items():
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(part.skipped.items()))
            skipped = sum(part.skipped.values())
            lines.append(
                f"{name}: {part.found} images found, {len(part.labels)} used, {skipped} skipped"
                + (f" ({why})" if why else "")
            )
        train = self.parts.get("train")
        if train is not None and len(self.parts) > 1:
            lacking = sorted(set(range(len(self.classes))) - set(train.labels.tolist()))
            if lacking:
                some = ", ".join(self.classes[i] for i in lacking[:6]) + (", ..." if len(lacking) > 6 else "")
                lines.append(f"without a train image: {some}")
        return "; ".join(lines)


@dataclass
class _Group:
    """The images of one split and what is known of their labels; `extra` are images that no image of it stands for."""

    images: EncodedImages
    columns: list[labels.Column]
    extra: Counter = field(default_factory=Counter)


def read_digits() -> Opened:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, grey turned into RGB (UCI ML; shipped with scikit-learn)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    array = np.repeat(grey[..., None], 3, axis=3)
    part = Part(ArrayImages(array), digits.target.astype(np.int64), len(array))
    return Opened({"train": part}, tuple("0123456789"), "built in")


def open_images(name_or_path: str | Path, label: str, skip_broken: bool = False) -> Opened:
    """Open a folder or a Hugging Face set; its image and label columns are found by type.

    A part without labels (all missing or -1) is left out. With `skip_broken`, images that cannot be decoded are left
    out; all are decoded once to find them.

    Raises:
        InputError: nothing there, no images, no labels, labels that are no classes, or an image that cannot be read.
    """
    name = str(name_or_path)
    folder = Path(name).expanduser()
    is_path = folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    if is_path and not folder.is_dir():
        raise InputError(f"dataset folder {name!r} does not exist; give 'digits', a Hugging Face name or a folder")
    if not is_path or (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        groups, how = _from_tables(_load_tables(name, is_path), name, label)
    elif files := [file for file in parquet.parquet_files(folder) if file.name not in listed.FILES]:
        groups, how = _from_parquet(folder, files, label)
    else:
        groups, how = _from_folders(folder, label)
    groups = {split: groups[split] for split in ("train", "val", "test") if split in groups}
    classes, values = labels.encode({split: group.columns for split, group in groups.items()})
    parts, withheld = {}, []
    for split, group in groups.items():
        if (given := values[split]) is None:
            withheld.append(f"{split}: {len(group.images)} images without labels, not used")
            continue
        parts[split] = _part(group, given, skip_broken)
    if not parts:
        raise InputError(f"{name} has no images with labels ({'; '.join(withheld) or how}); give it labels")
    return Opened(parts, classes, "; ".join([how, *withheld]))


def _part(group: _Group, given: np.ndarray, skip_broken: bool) -> Part:
    images, skipped, found = group.images, group.extra.copy(), len(group.images) + sum(group.extra.values())
    if skip_broken and (broken := images.broken()):
        keep = np.setdiff1d(np.arange(len(images)), broken)
        if not len(keep):
            raise InputError(f"{images.where(0)}: neither this nor any other of {len(images)} images can be read")
        images, given = images.chosen(keep), given[keep]
        skipped["broken"] += len(broken)
    return Part(in_memory(images), given, found, skipped)


def _from_folders(root: Path, label: str) -> tuple[dict[str, _Group], str]:
    """Folders of image files, listed in a table or sorted into class folders."""
    tables = {"": listed.listing(root)} if listed.listing(root) else _listings_of_splits(root)
    groups: dict[str, _Group] = {}
    for split, table in tables.items():
        for name, (files, column, unlisted) in (listed.read_listing(table, label) or {}).items():
            extra = Counter({f"not in {table.name}": unlisted} if unlisted else {})
            groups[split or name] = _Group(FileImages(files), [column], extra)
    if groups:
        return groups, f"images and labels are those of {', '.join(str(table) for table in tables.values())}"
    if label:
        one_of("label column", label, ["label"])  # class folders have no columns
    found, how = folders.read_folders(root)
    for split, group in found.items():
        groups[split] = _Group(FileImages(group.files), [labels.Column(str(root), group.labels)], group.skipped)
    return groups, how


def _listings_of_splits(root: Path) -> dict[str, Path]:
    """The tables in folders with a split's name, if all folders have both."""
    below = [path for path in sorted(root.iterdir()) if path.is_dir() and not folders.is_hidden(path.name)]
    tables = {folders.SPLITS.get(path.name.lower(), ""): listed.listing(path) for path in below}
    return tables if all(tables) and all(tables.values()) and len(tables) == len(below) else {}


def _from_parquet(root: Path, files: list[Path], label: str) -> tuple[dict[str, _Group], str]:
    import datasets

    splits, other = parquet.by_split(root, files)
    first = next(iter(splits.values()))[0]
    schema = parquet.schema_of(first)
    column = parquet.image_column(schema, lambda name: parquet.first_value(first, name), str(first))
    answers = parquet.label_column(schema, label, str(first))
    found = {split: [parquet.labels_of(file, answers) for file in group] for split, group in splits.items()}
    for group in splits.values():
        for file in group:
            one_of(f"image column of {file}:", column, parquet.schema_of(file).names)
    try:
        tables = datasets.load_dataset(
            "parquet",
            data_files={split: [glob.escape(str(file.resolve())) for file in group] for split, group in splits.items()},
            columns=[column],
            features=datasets.Features({column: datasets.Image(decode=False)}),
            cache_dir=str(paths.data_cache()),
        )
    except Exception as error:  # the library raises many kinds, some its own
        raise InputError(f"the folder {str(root)!r} could not be read as an image set: {_reason(error)}") from error
    groups = {}
    for split, columns in found.items():
        counts = [(each.place, len(each.values)) for each in columns]
        groups[split] = _Group(TableImages(tables[split], column, counts), columns)
    how = f"parquet, images in {column!r}, labels in {answers!r}"
    names = "; ".join(f"{split} is {_some([file.name for file in group])}" for split, group in splits.items())
    unread = f"; not read, as their names say no split: {_some([file.name for file in other])}" if other else ""
    loose = sum(1 for _ in folders.images_below(root))
    return groups, f"{how}; {names}{unread}" + (f"; {loose} image files beside them are not read" if loose else "")


def _from_tables(tables: Mapping[str, Any], name: str, label: str) -> tuple[dict[str, _Group], str]:
    """Tables of the `datasets` library, by split."""
    first = next(iter(tables.values()))
    schema = first.features.arrow_schema
    column = parquet.image_column(schema, lambda key: next((v for v in first[key][:16] if v is not None), None), name)
    answers = parquet.label_column(schema, label, name)
    groups, other = {}, []
    for key, table in tables.items():
        split = parquet.SPLIT_WORDS.get(key.lower())
        if split is None or split in groups:
            other.append(key)
            continue
        place = f"{name}, split {key}"
        one_of(f"label column of {place}:", answers, table.column_names)
        names = parquet.class_names(table.features.arrow_schema, answers)
        images = TableImages(table, column, [(place, len(table))])
        groups[split] = _Group(images, [labels.Column(place, list(table[answers]), names)])
    if not groups:
        raise InputError(f"{name} has splits {', '.join(tables)} but none named train, val or test with labels")
    how = f"images in {column!r}, labels in {answers!r}"
    return groups, how + (f"; splits that are not read: {', '.join(other)}" if other else "")


def _load_tables(name: str, is_path: bool) -> dict[str, Any]:
    import datasets

    if is_path:
        try:
            loaded = datasets.load_from_disk(str(Path(name).expanduser()))
        except Exception as error:  # the library raises many kinds, some its own
            raise InputError(f"the folder {name!r} could not be read as an image set: {_reason(error)}") from error
    else:
        what = f"unknown dataset {name!r}: it is not 'digits' and not a folder here; the hub's image set of that name"
        with hub.fetching(what, "give a local folder"):
            loaded = datasets.load_dataset(name, cache_dir=str(paths.data_cache()))
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
