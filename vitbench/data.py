"""Image sets: a name or a folder becomes train / val / calibration / test splits with a fingerprint of their content.

No choice is ever made on `test`. `val` is there to choose settings on, and `calibration` is a part of `train` from
which methods collect statistics.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from vitbench.errors import InputError
from vitbench.image_sources import ArrayImages, Images, open_images, read_digits

MINIMUM_CLASSES = 2


@dataclass(frozen=True, eq=False)
class Split:
    """Some images of a source: `indices` into it, and the `labels` (int64) of those images."""

    name: str
    source: Images
    indices: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        """Image `i` (RGB) and its label."""
        return self.source[int(self.indices[i])], int(self.labels[i])

    def some(self, count: int) -> "Split":
        """`count` of the images, spread evenly over the split; all if there are no more."""
        places = np.linspace(0, len(self), min(count, len(self)), endpoint=False).astype(int)
        return Split(self.name, self.source, self.indices[places], self.labels[places])

    @property
    def array(self) -> np.ndarray | None:
        """All images as uint8 (N, H, W, 3) where the source holds them in memory, else None."""
        return self.source.array[self.indices] if isinstance(self.source, ArrayImages) else None


@dataclass(frozen=True, eq=False)
class ImageData:
    """An image-classification set.

    Attributes:
        name: how rows and figures name the set.
        classes: class names; a label is an index into it.
        train, val, calibration, test: the splits; any but `test` may be empty.
        fingerprint: 16 hex digits, a hash of the images, the labels and the membership of each split.
        origin: where each split came from, in words ("given", "cut from train", ...).
        image_size: height and width of the first image, in pixels.
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

    def needs(self, split: str) -> Split:
        """The named split, or `InputError` if this set was cut so that it is empty."""
        found: Split = getattr(self, split)
        if len(found) == 0:
            raise InputError(
                f"{self.name} has no {split} images as it was cut ({self.describe()}); "
                f"leave more of it out of the test split, for example test=0.2"
            )
        return found

    def describe(self) -> str:
        """One line: the size of each split and where it came from."""
        return "; ".join(f"{name} {len(getattr(self, name))}: {how}" for name, how in self.origin.items())


def load_data(
    name_or_path: str | Path,
    *,
    name: str = "",
    test: float | int | None = None,
    val: float | int = 0.1,
    calibration: float | int = 256,
    train: float | int | None = None,
    label: str = "",
    seed: int = 0,
) -> ImageData:
    """Load an image-classification set and cut it into fixed, stratified splits.

    Args:
        name_or_path: "digits" (built in, no network), the name of a Hugging Face set, or a local folder (parquet
            files or one folder of images a class).
        name: how rows and figures name the set; by default the last part of `name_or_path`.
        test: how many test images: a fraction (0 to 1) or a count. Where the set comes with a labelled test split,
            None takes it whole and a number takes a part of it; where it does not, None means 0.2 of all images, and
            1.0 makes every image a test image (to score a pretrained model).
        val: how much of the training images becomes `val`, likewise.
        calibration: how much of `train` (it stays in `train`) methods may collect statistics from, likewise.
        train: keep only so many training images (None: all), for runs at smaller scale.
        label: the label column, where the set has several (CIFAR-100's fine and coarse labels, say).
        seed: of the cuts. It is not the seed of training: runs with different seeds share one test split.

    Raises:
        InputError: an unknown set, a folder without images, no label column, fewer than two classes.
    """
    for key, amount in {"test": test, "val": val, "calibration": calibration, "train": train}.items():
        _check_amount(key, amount)
    if str(name_or_path) == "digits":
        parts, classes = read_digits()
    else:
        parts, classes = open_images(name_or_path, label)
    name = name or Path(str(name_or_path)).name
    present = np.unique(np.concatenate([labels for _, labels in parts.values()]))
    if len(present) < MINIMUM_CLASSES:
        raise InputError(f"{name} has {len(present)} class; classification needs at least {MINIMUM_CLASSES}")

    rng = np.random.default_rng(seed)
    pools = {part: Split(part, source, np.arange(len(labels)), labels) for part, (source, labels) in parts.items()}
    pools, origin = _name_pools(pools, test is not None and test == 1)
    pools, origin = _cut_test(pools, origin, test, rng)
    if train is not None:
        _, pools["train"] = _cut(pools["train"], train, rng)
        origin["train"] += f", a stratified part of {len(pools['train'])}"
    if "val" in pools:
        origin["val"] = "given"
    else:
        pools["train"], pools["val"] = _cut(pools["train"], val, rng)
        origin["val"] = "cut from train"
    _, pools["calibration"] = _cut(pools["train"], calibration, rng)
    origin["calibration"] = "part of train"
    splits = {key: Split(key, pool.source, pool.indices, pool.labels) for key, pool in pools.items()}
    return ImageData(
        name=name,
        classes=classes,
        fingerprint=_fingerprint(splits, classes),
        origin={key: origin[key] if len(splits[key]) else "none" for key in ("train", "val", "calibration", "test")},
        image_size=splits["test"][0][0].size[::-1],
        **splits,
    )


def _check_amount(key: str, amount: float | int | None) -> None:
    if amount is None:
        return
    whole = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 0
    fraction = isinstance(amount, float) and 0 <= amount <= 1
    if not (whole or fraction):
        raise InputError(f"{key} = {amount!r}: give a fraction from 0.0 to 1.0 or a whole number of images")


def _name_pools(pools: dict[str, Split], all_test: bool) -> tuple[dict[str, Split], dict[str, str]]:
    """Name what a set comes with: train, test and perhaps val. A set's only evaluation split serves as `test`."""
    pools = dict(pools)
    origin = dict.fromkeys(pools, "given")
    if "test" not in pools and "val" in pools:
        pools["test"], origin["test"] = pools.pop("val"), "the set's validation split"
        origin.pop("val")
    if "train" not in pools:
        only = pools.pop("test")
        pools["train"], origin["train"] = only, origin.pop("test", "given")
    if all_test and "test" not in pools:
        pools["test"], origin["test"] = pools["train"], "all images"
        pools["train"], origin["train"] = _take(pools["train"], np.array([], dtype=int)), "none left"
    return pools, origin


def _cut_test(
    pools: dict[str, Split], origin: dict[str, str], test: float | int | None, rng: np.random.Generator
) -> tuple[dict[str, Split], dict[str, str]]:
    if "test" not in pools:
        pools["train"], pools["test"] = _cut(pools["train"], 0.2 if test is None else test, rng)
        origin["test"] = "cut from the only split"
    elif test is not None and test != 1.0:
        _, pools["test"] = _cut(pools["test"], test, rng)
        origin["test"] += f", a stratified part of {len(pools['test'])}"
    if len(pools["test"]) == 0:
        raise InputError(f"test = {test!r} leaves no test image; give a larger fraction or count")
    return pools, origin


def _cut(pool: Split, amount: float | int, rng: np.random.Generator) -> tuple[Split, Split]:
    """Split `pool` in two, the second with `amount` images, keeping the shares of the classes where it can."""
    from sklearn.model_selection import train_test_split

    count = min(len(pool), round(amount * len(pool)) if isinstance(amount, float) else amount)
    everything = np.arange(len(pool))
    if count in (0, len(pool)):
        rest, taken = (everything, everything[:0]) if count == 0 else (everything[:0], everything)
        return _take(pool, rest), _take(pool, taken)
    classes, sizes = np.unique(pool.labels, return_counts=True)
    can_stratify = sizes.min() >= 2 and min(count, len(pool) - count) >= len(classes)
    rest, taken = train_test_split(
        everything,
        test_size=count,
        random_state=int(rng.integers(2**31)),
        stratify=pool.labels if can_stratify else None,
    )
    return _take(pool, np.sort(rest)), _take(pool, np.sort(taken))


def _take(pool: Split, positions: np.ndarray) -> Split:
    return Split(pool.name, pool.source, pool.indices[positions], pool.labels[positions])


def _fingerprint(splits: dict[str, Split], classes: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(classes).encode())
    hashed: dict[int, str] = {}  # several splits may share one source; hash its images once
    for key in sorted(splits):
        split = splits[key]
        content = hashed.setdefault(id(split.source), split.source.content_hash())
        digest.update(f"{key}:{content}".encode())
        digest.update(split.indices.astype("<i8").tobytes())
        digest.update(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()[:16]
