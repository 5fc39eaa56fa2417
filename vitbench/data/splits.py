"""Load image sets by name or folder, as train / val / calibration / test splits with a fingerprint of their content.

No choice is ever made on `test`. Settings are chosen on `val`. `calibration` is a part of `train` from which methods
collect statistics.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitbench.base import paths
from vitbench.base.configs import digest
from vitbench.base.errors import InputError, one_of
from vitbench.data.sources import ArrayImages, Images, ImageSet, open_images, read_digits

SHIPPED = ("photographs", "digits")  # sets that need neither a network nor a folder
MIN_CLASSES = 2
DEFAULT_VAL_FRACTION, DEFAULT_CALIBRATION_IMAGES = 0.1, 256

_NOTED = frozenset({"train", "val", "calibration", "test", "fingerprint"})  # a fingerprint is read to look a result up

_printed_lines: set[str] = set()  # the lines that this process has printed


@dataclass(frozen=True, eq=False)
class Split:
    """Some images of a source: `indices` into it, (N,), and the images' `labels`, (N,) int64."""

    name: str
    source: Images
    indices: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        """Image `i` (RGB) and its label."""
        return self.source[int(self.indices[i])], int(self.labels[i])

    def subset(self, count: int) -> "Split":
        """`count` of the images, spread evenly over the split; all images if it has fewer."""
        return _select(self, np.linspace(0, len(self), min(count, len(self)), endpoint=False).astype(int))

    @property
    def array(self) -> np.ndarray | None:
        """All images as uint8 (N, H, W, 3) if the source holds them in memory; otherwise None."""
        return self.source.array[self.indices] if isinstance(self.source, ArrayImages) else None


@dataclass(frozen=True, eq=False)
class ImageData:
    """An image-classification set.

    Attributes:
        name: the set's name in rows and figures.
        classes: class names; a label is an index into them.
        train, val, calibration, test: the splits; any but `test` may be empty.
        fingerprint: 16 hex digits, a hash of the images, the labels and the membership of each split.
        origin: where each split came from, in words ("given", "cut from train", ...).
        image_size: height and width of the first test image, in pixels.
        summary: one line: the splits and classes that were recognised, and how many images were found, used and skipped.
        source: the `name_or_path` that was loaded.
        amounts: the amounts and the seed that `load_data` was given for the splits.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    calibration: Split
    test: Split
    fingerprint: str
    origin: dict[str, str] = field(default_factory=dict)
    image_size: tuple[int, int] = (0, 0)
    summary: str = ""
    source: str = ""
    amounts: dict[str, Any] = field(default_factory=dict)
    _options: dict[str, Any] = field(default_factory=dict)  # the other arguments of `load_data`

    def require_split(self, split: str) -> Split:
        """The split of that name; raises `InputError` if it is empty."""
        selected: Split = getattr(self, split)
        if len(selected) == 0:
            raise InputError(
                f"{self.name} has no {split} images as it was split ({self.describe()}); "
                f"give the test split fewer images, for example test=0.2"
            )
        return selected

    def train_on(self, split: str) -> "ImageData":
        """The same set with the images of `split` as the training images, and none to score between epochs.

        Its fingerprint is another one, so that nothing kept of a training on all training images is taken for its own.
        """
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(ImageData)}
        fields |= {"train": self.require_split(split), "val": self.val.subset(0)}
        return ImageData(**fields | {"fingerprint": digest([self.fingerprint, split])})

    def reload(self, **amounts: Any) -> "ImageData":
        """The same images in other splits: `load_data` with `amounts` in place of its `test`, `val`, `calibration`, `train`, `seed`."""
        return load_data(self.source, name=self.name, **self._options, **{**self.amounts, **amounts})

    def identity(self) -> dict[str, Any]:
        """What tells these images and splits from others, as JSON types: the fingerprint, the name, the amounts."""
        return {"fingerprint": self.fingerprint, "name": self.name, **self.amounts}

    def describe(self) -> str:
        """One line: the size of each split and where it came from."""
        return "; ".join(f"{name} {len(getattr(self, name))}: {origin}" for name, origin in self.origin.items())


def load_data(
    name_or_path: str | Path,
    *,
    name: str = "",
    test: float | int | None = None,
    val: float | int | None = None,
    calibration: float | int | None = None,
    train: float | int | None = None,
    label: str = "",
    classes: Sequence[str] = (),
    seed: int = 0,
    skip_broken: bool = False,
) -> ImageData:
    """Load an image-classification set, cut it into fixed, stratified splits, and print what was recognised.

    Args:
        name_or_path: "photographs" (9,000 of CIFAR-10, with the project) or "digits" (8 x 8 pixels), both without
            network; the name of a Hugging Face set; or a local folder, which holds one sub-folder of images for each
            class (`vitbench.data.folders` describes when sub-folders are splits), images listed in a metadata.csv, or
            parquet files. `vitbench.data.decoding` describes how files are decoded to pixels.
        name: the set's name in rows and figures; by default the last part of `name_or_path`.
        test: how many test images, as a fraction (0 to 1) or a count. If the set has a labelled test split, None uses
            all of it and a number uses a part. Otherwise None uses 0.2 of all images, and 1.0 makes every image a test
            image (to score a pretrained model).
        val: how many of the training images become `val`, as a fraction or a count; None means 0.1 if the set has no
            val split.
        calibration: how many images of `train` are the calibration set, as a fraction or a count; they stay in
            `train`. None means 256, or all if there are fewer.
        train: use only this many training images, as a fraction or a count, for smaller runs; None uses all.
        label: the label column, if the set has several, such as CIFAR-100's fine and coarse labels.
        classes: the names of a model's outputs, in their order. Labels become indices into them, matched by name, so a
            set with images of some of a model's classes fits the model. Empty means the set's own classes.
        seed: the seed of the splits. Training has its own seed, so runs with different seeds share one test split.
        skip_broken: leave out images that cannot be decoded, and print how many; otherwise the first is an error.

    Raises:
        InputError: an unknown set, a folder without images, no label column, labels that are not classes, fewer than
            two classes, an image that cannot be read, or more images requested than there are.
    """
    for key, amount in {"test": test, "val": val, "calibration": calibration, "train": train}.items():
        _check_amount(key, amount)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed = {seed!r}: give a whole number from 0 on")
    if not isinstance(skip_broken, bool):
        raise InputError(f"skip_broken = {skip_broken!r}: give true or false")
    name = name or Path(str(name_or_path)).name
    if str(name_or_path) == "digits":
        image_set = read_digits()
    else:
        folder = _photographs() if str(name_or_path) == "photographs" else name_or_path
        image_set = open_images(folder, label, skip_broken)
    if classes:
        image_set = _in_classes(image_set, [str(each) for each in classes], name)
    summary = f"{name}: {image_set.describe()}"
    _print_once(summary)
    present = np.unique(np.concatenate([part.labels for part in image_set.parts.values()]))
    if len(present) < MIN_CLASSES:
        raise InputError(f"{name} has {len(present)} class; classification needs at least {MIN_CLASSES}")

    amounts = {"test": test, "val": val, "calibration": calibration, "train": train}
    splits = {
        key: Split(key, part.images, np.arange(len(part.labels)), part.labels) for key, part in image_set.parts.items()
    }
    splits, origin = _split_all(splits, test, val, calibration, train, np.random.default_rng(seed))
    splits = {key: Split(key, split.source, split.indices, split.labels) for key, split in splits.items()}
    return ImageData(
        name=name,
        classes=image_set.classes,
        fingerprint=_fingerprint(splits, image_set.classes),
        origin={key: origin[key] if len(splits[key]) else "none" for key in ("train", "val", "calibration", "test")},
        image_size=splits["test"][0][0].size[::-1],
        summary=summary,
        source=str(name_or_path),
        amounts={key: amount for key, amount in amounts.items() if amount is not None} | {"seed": seed},
        _options={"label": label, "classes": tuple(classes), "skip_broken": skip_broken},
        **splits,
    )


class WatchedData(ImageData):
    """A copy of image data that notes whether its splits or its fingerprint were read."""

    def __init__(self, data: ImageData):
        super().__init__(**{each.name: getattr(data, each.name) for each in dataclasses.fields(ImageData)})
        object.__setattr__(self, "was_used", False)

    def __getattribute__(self, name: str) -> Any:
        if name in _NOTED:
            object.__setattr__(self, "was_used", True)
        return super().__getattribute__(name)


def _in_classes(image_set: ImageSet, classes: list[str], name: str) -> ImageSet:
    """The set with labels that are indices into `classes`; a class without images needs no counterpart."""
    if len(set(classes)) < len(classes):
        raise InputError(f"classes = {', '.join(classes)}: a name is there twice; name each output of the model once")
    parts = {}
    for key, part in image_set.parts.items():
        names = {label: image_set.classes[label] for label in np.unique(part.labels)}
        index = {label: classes.index(one_of(f"class of {name}", own, classes)) for label, own in names.items()}
        labels = np.array([index[label] for label in part.labels], dtype=np.int64)
        parts[key] = dataclasses.replace(part, labels=labels)
    return ImageSet(parts, tuple(classes), image_set.layout)


def _photographs() -> Path:
    folder = paths.shipped("photographs")
    if folder is None:
        raise InputError(
            "the images 'photographs' come with the project's checkout, and this installation has none; "
            "give 'digits', a Hugging Face name, or a folder"
        )
    return folder


def _print_once(line: str) -> None:
    """Print a line once in a process, even if it loads the set several times."""
    if line not in _printed_lines:
        _printed_lines.add(line)
        print(line)


def _check_amount(key: str, amount: float | int | None) -> None:
    if amount is None:
        return
    whole = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 0
    fraction = isinstance(amount, float) and 0 <= amount <= 1
    if not (whole or fraction):
        raise InputError(f"{key} = {amount!r}: give a fraction from 0.0 to 1.0 or a whole number of images")


def _assign_splits(splits: dict[str, Split], all_test: bool) -> tuple[dict[str, Split], dict[str, str]]:
    """The set's own splits as train, test and perhaps val, with their origins. An only evaluation split is `test`."""
    splits = dict(splits)
    origin = dict.fromkeys(splits, "given")
    if "test" not in splits and "val" in splits:
        splits["test"], origin["test"] = splits.pop("val"), "the set's validation split"
        origin.pop("val")
    if "train" not in splits:
        only_split = splits.pop("test")
        splits["train"], origin["train"] = only_split, origin.pop("test", "given")
    if all_test and "test" not in splits:
        splits["test"], origin["test"] = splits["train"], "all images"
        splits["train"], origin["train"] = _select(splits["train"], np.array([], dtype=int)), "none left"
    return splits, origin


def _split_all(
    splits: dict[str, Split],
    test: float | int | None,
    val: float | int | None,
    calibration: float | int | None,
    train: float | int | None,
    rng: np.random.Generator,
) -> tuple[dict[str, Split], dict[str, str]]:
    """The four splits and their origins. Each amount is checked against the number of images that remain for it."""
    splits, origin = _assign_splits(splits, test is not None and test == 1)
    if "test" not in splits:
        _check_available("test", test, len(splits["train"]), "images")
        splits["train"], splits["test"] = _split_off(splits["train"], 0.2 if test is None else test, rng)
        origin["test"] = "cut from the only split"
    elif test is not None and test != 1.0:
        _check_available("test", test, len(splits["test"]), "test images")
        _, splits["test"] = _split_off(splits["test"], test, rng)
        origin["test"] += f", a stratified part of {len(splits['test'])}"
    if len(splits["test"]) == 0:
        raise InputError(f"test = {test!r} leaves no test image; give a larger fraction or count")
    if train is not None:
        _check_available("train", train, len(splits["train"]), "images that the test split leaves")
        _, splits["train"] = _split_off(splits["train"], train, rng)
        origin["train"] += f", a stratified part of {len(splits['train'])}"
    for key, amount in (("test", test), ("train", train)):
        if isinstance(amount, float) and 0 < amount < 1 and len(splits["train"]) == 0:
            raise InputError(
                f"{key} = {amount!r} of so few images leaves no training image; give counts, or more images"
            )
    remaining_text = f"training images ({origin['train']})"
    if "val" not in splits:
        _check_available("val", val, len(splits["train"]), remaining_text, min_remaining=1)
        splits["train"], splits["val"] = _split_off(splits["train"], DEFAULT_VAL_FRACTION if val is None else val, rng)
        origin["val"] = "cut from train"
    elif val is not None:
        _check_available("val", val, len(splits["val"]), "validation images")
        _, splits["val"] = _split_off(splits["val"], val, rng)
        origin["val"] += f", a stratified part of {len(splits['val'])}"
    _check_available("calibration", calibration, len(splits["train"]), "training images that val leaves")
    _, splits["calibration"] = _split_off(
        splits["train"], DEFAULT_CALIBRATION_IMAGES if calibration is None else calibration, rng
    )
    origin["calibration"] = "part of train"
    return splits, origin


def _check_available(
    key: str, amount: float | int | None, available: int, description: str, min_remaining: int = 0
) -> None:
    """Raise `InputError` if `amount` is above `available`, or leaves fewer than `min_remaining` images."""
    if amount is None or (isinstance(amount, float) and not min_remaining):
        return
    count = round(amount * available) if isinstance(amount, float) else amount
    if count and count > available - min_remaining:
        remaining_text = f", and {min_remaining} of them has to stay" if min_remaining and available else ""
        raise InputError(
            f"{key} = {amount!r}: there are {available} {description}{remaining_text}; give at most {max(0, available - min_remaining)}"
        )


def _split_off(split: Split, amount: float | int, rng: np.random.Generator) -> tuple[Split, Split]:
    """Cut a split in two, the second with `amount` images, stratified by class if each class has enough images."""
    from sklearn.model_selection import train_test_split

    count = min(len(split), round(amount * len(split)) if isinstance(amount, float) else amount)
    indices = np.arange(len(split))
    if count in (0, len(split)):
        first_indices, second_indices = (indices, indices[:0]) if count == 0 else (indices[:0], indices)
        return _select(split, first_indices), _select(split, second_indices)
    classes, sizes = np.unique(split.labels, return_counts=True)
    can_stratify = sizes.min() >= 2 and min(count, len(split) - count) >= len(classes)
    first_indices, second_indices = train_test_split(
        indices,
        test_size=count,
        random_state=int(rng.integers(2**31)),
        stratify=split.labels if can_stratify else None,
    )
    return _select(split, np.sort(first_indices)), _select(split, np.sort(second_indices))


def _select(split: Split, positions: np.ndarray) -> Split:
    return Split(split.name, split.source, split.indices[positions], split.labels[positions])


def _fingerprint(splits: dict[str, Split], classes: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(classes).encode())
    hashed: dict[int, str] = {}  # several splits may share one source, whose images are hashed once
    for key in sorted(splits):
        split = splits[key]
        content = hashed.setdefault(id(split.source), split.source.content_hash())
        digest.update(f"{key}:{content}".encode())
        digest.update(split.indices.astype("<i8").tobytes())
        digest.update(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()[:16]
