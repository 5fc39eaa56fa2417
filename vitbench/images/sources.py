"""Sequences of RGB images: in memory, as files, or as bytes in a table."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vitbench import progress
from vitbench.errors import InputError
from vitbench.images.decoding import Undecodable, decode, treatment

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
        return [i for i in progress.bar(range(len(self)), "looking for broken images") if not self._is_whole(i)]

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
