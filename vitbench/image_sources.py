"""Where images come from: scikit-learn's digits, or a Hugging Face set by hub name or local folder."""

import contextlib
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitbench import paths
from vitbench.errors import InputError, one_of

SMALL_SIDE = 64  # images up to this side are decoded once and held in memory
HASHED_IMAGES = 5_000  # a larger set on disk is fingerprinted by this many evenly spaced images
VAL_NAMES = ("validation", "valid", "val", "dev")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}

Parts = dict[str, tuple["Images", np.ndarray]]


class Images(Protocol):
    """A sequence of RGB images with a hash of their content."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Image.Image: ...

    def content_hash(self) -> str: ...


class ArrayImages:
    """Small images held in memory as uint8 (N, H, W, 3)."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: int) -> Image.Image:
        return Image.fromarray(self.array[i])

    def content_hash(self) -> str:
        return hashlib.sha256(str(self.array.shape).encode() + self.array.tobytes()).hexdigest()


class EncodedImages:
    """Images left encoded in a `datasets` column and decoded when asked for."""

    def __init__(self, table: Any, column: str):
        from datasets import Image as ImageFeature

        self.column = column
        self.table = table.select_columns([column]).cast_column(column, ImageFeature(decode=False))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Image.Image:
        return self._decode(self._bytes(self.table[i]), i)

    def __iter__(self) -> Iterator[Image.Image]:
        for i, row in enumerate(self.table):
            yield self._decode(self._bytes(row), i)

    def content_hash(self) -> str:
        digest = hashlib.sha256(str(len(self)).encode())
        step = max(1, len(self) // HASHED_IMAGES)
        for i in range(0, len(self), step):
            digest.update(self._bytes(self.table[i]))
        return digest.hexdigest()

    def _bytes(self, row: dict[str, Any]) -> bytes:
        cell = row[self.column]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    @staticmethod
    def _decode(encoded: bytes, i: int) -> Image.Image:
        try:
            return Image.open(io.BytesIO(encoded)).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"image {i} of the set cannot be decoded ({error}); remove or replace it") from None


def read_digits() -> tuple[Parts, tuple[str, ...]]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, grey turned into RGB (UCI ML; shipped with scikit-learn)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    array = np.repeat(grey[..., None], 3, axis=3)
    return {"train": (ArrayImages(array), digits.target.astype(np.int64))}, tuple("0123456789")


def open_images(name_or_path: str | Path, label: str) -> tuple[Parts, tuple[str, ...]]:
    """Open a Hugging Face set; its image and label columns are found by type.

    Returns the parts that the set comes with, named train / val / test, each (images, labels), and the class names.
    A part whose labels are withheld (all negative) is left out.
    """
    tables = _load_tables(str(name_or_path))
    first = next(iter(tables.values()))
    image_column = _image_column(first, str(name_or_path))
    label_column = _label_column(first, label, str(name_or_path))
    classes = _class_names(tables, label_column)
    parts: Parts = {}
    for key, table in tables.items():
        part = "val" if key in VAL_NAMES else key
        labels = _labels(table, label_column, classes)
        if part not in ("train", "val", "test") or len(labels) == 0 or labels.max() < 0:
            continue
        parts[part] = (_in_memory(EncodedImages(table, image_column)), labels)
    if not parts:
        raise InputError(
            f"{name_or_path!s} has splits {', '.join(tables)} but none named train, val or test with labels"
        )
    return parts, classes


def _load_tables(name_or_path: str) -> dict[str, Any]:
    import datasets

    folder = Path(name_or_path).expanduser()
    is_path = folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name_or_path)
    if is_path:
        _check_folder(folder)
    options = {"cache_dir": str(paths.data_cache())}
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        elif is_path and not any(folder.rglob("*.parquet")):
            loaded = datasets.load_dataset("imagefolder", data_dir=str(folder.resolve()), drop_labels=False, **options)
        elif is_path:
            loaded = datasets.load_dataset(str(folder.resolve()), **options)
        else:
            with _hub_or_cache(name_or_path):
                loaded = datasets.load_dataset(name_or_path, **options)
    except Exception as error:  # the library raises many kinds, some its own, some of its network client
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if is_path:
            raise InputError(f"the folder {name_or_path!r} could not be read as an image set: {reason}") from error
        raise InputError(
            f"unknown dataset {name_or_path!r}: it is not 'digits', not a folder here, and the Hugging Face hub did not "
            f"give it ({reason}); check the name and the network, or give a local folder"
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


@contextlib.contextmanager
def _hub_or_cache(name: str) -> Iterator[None]:
    """Fail at once on a name that the hub does not have; without a network, look only at what was downloaded before."""
    import datasets
    import huggingface_hub

    offline = datasets.config.HF_HUB_OFFLINE
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:
        raise
    except Exception:  # no network: the kinds differ with the hub client's version
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(
            f"dataset folder {str(folder)!r} does not exist; give 'digits', a Hugging Face name or a folder"
        )
    wanted = IMAGE_SUFFIXES | {".parquet", ".arrow"}
    if not any(path.suffix.lower() in wanted for path in folder.rglob("*") if path.is_file()):
        raise InputError(
            f"the folder {str(folder)!r} holds no images; allowed: parquet files with an image column, "
            f"or one sub-folder of images a class"
        )


def _image_column(table: Any, name: str) -> str:
    import datasets

    found = [key for key, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not found:
        raise InputError(f"{name} has no image column; its columns are {', '.join(table.features)}")
    return found[0]


def _label_column(table: Any, label: str, name: str) -> str:
    import datasets

    features = table.features
    if label:
        return one_of("label column", label, features)
    typed = {key: feature.num_classes for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    if typed:  # of several the finest, as CIFAR-100's 100 fine classes rather than its 20 coarse ones
        return max(typed, key=typed.get)
    named = [key for key in ("label", "labels", "class", "target") if key in features]
    if not named:
        raise InputError(f"{name} has no label column; its columns are {', '.join(features)}; give label=COLUMN")
    return named[0]


def _class_names(tables: dict[str, Any], column: str) -> tuple[str, ...]:
    feature = next(iter(tables.values())).features[column]
    if hasattr(feature, "names"):
        return tuple(feature.names)
    values = {value for table in tables.values() for value in table.unique(column) if value is not None}
    values.discard(-1)
    return tuple(str(value) for value in sorted(values))


def _labels(table: Any, column: str, classes: tuple[str, ...]) -> np.ndarray:
    values = table[column][:] if len(table) else []
    if hasattr(table.features[column], "names"):
        return np.array(values, dtype=np.int64)
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index.get(str(value), -1) for value in values], dtype=np.int64)


def _in_memory(images: EncodedImages) -> Images:
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
