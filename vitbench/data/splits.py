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

from vitbench.base import paths
from vitbench.base.errors import InputError
from vitbench.data.sources import ArrayImages, Images, open_images, read_digits

MINIMUM_CLASSES = 2
PHOTOGRAPHS = "photographs"
VAL, CALIBRATION = 0.1, 256  # how much becomes val and calibration where nothing is given

_said: set[str] = set()  # the lines that this process has printed


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
        recognised: one line: what was taken for splits and classes, and how many images were found, used and skipped.
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
    recognised: str = ""

    def require_split(self, split: str) -> Split:
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
    val: float | int | None = None,
    calibration: float | int | None = None,
    train: float | int | None = None,
    label: str = "",
    seed: int = 0,
    skip_broken: bool = False,
) -> ImageData:
    """Load an image-classification set and cut it into fixed, stratified splits; print what was recognised.

    Args:
        name_or_path: "photographs" (9,000 of CIFAR-10, with the project) or "digits" (8 x 8 pixels), both without
            network; the name of a Hugging Face set, or a local folder: one sub-folder
            of images a class (`images.folders` says when sub-folders are splits), images listed in a metadata.csv, or
            parquet files. How files become pixels: `images.decoding`.
        name: how rows and figures name the set; by default the last part of `name_or_path`.
        test: how many test images: a fraction (0 to 1) or a count. Where the set comes with a labelled test split,
            None takes it whole and a number takes a part of it; where it does not, None means 0.2 of all images, and
            1.0 makes every image a test image (to score a pretrained model).
        val: how much of the training images becomes `val`, likewise; None means 0.1 where the set has no val split.
        calibration: how much of `train` (it stays in `train`) methods may collect statistics from; None means 256, or
            all if there are fewer.
        train: keep only so many training images (None: all), for runs at smaller scale.
        label: the label column, where the set has several (CIFAR-100's fine and coarse labels, say).
        seed: of the cuts. It is not the seed of training: runs with different seeds share one test split.
        skip_broken: leave out images that cannot be decoded, and print how many, where otherwise the first is an error.

    Raises:
        InputError: an unknown set, a folder without images, no label column, labels that are no classes, fewer than two
            classes, an image that cannot be read, or more images asked for than there are.
    """
    for key, amount in {"test": test, "val": val, "calibration": calibration, "train": train}.items():
        _check_amount(key, amount)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed = {seed!r}: give a whole number from 0 on")
    if not isinstance(skip_broken, bool):
        raise InputError(f"skip_broken = {skip_broken!r}: give true or false")
    name = name or Path(str(name_or_path)).name
    if str(name_or_path) == "digits":
        opened = read_digits()
    else:
        opened = open_images(_shipped(name_or_path), label, skip_broken)
    recognised = f"{name}: {opened.describe()}"
    _say(recognised)
    present = np.unique(np.concatenate([part.labels for part in opened.parts.values()]))
    if len(present) < MINIMUM_CLASSES:
        raise InputError(f"{name} has {len(present)} class; classification needs at least {MINIMUM_CLASSES}")

    pools = {
        key: Split(key, part.images, np.arange(len(part.labels)), part.labels) for key, part in opened.parts.items()
    }
    pools, origin = _cut_all(pools, test, val, calibration, train, np.random.default_rng(seed))
    splits = {key: Split(key, pool.source, pool.indices, pool.labels) for key, pool in pools.items()}
    return ImageData(
        name=name,
        classes=opened.classes,
        fingerprint=_fingerprint(splits, opened.classes),
        origin={key: origin[key] if len(splits[key]) else "none" for key in ("train", "val", "calibration", "test")},
        image_size=splits["test"][0][0].size[::-1],
        recognised=recognised,
        **splits,
    )


def _shipped(name_or_path: str | Path) -> str | Path:
    """The folder of the photographs that come with the project, for their name; anything else as it is."""
    if str(name_or_path) != PHOTOGRAPHS:
        return name_or_path
    folder = paths.shipped(PHOTOGRAPHS)
    if folder is None:
        raise InputError(
            f"the images {PHOTOGRAPHS!r} come with the project's checkout, and this installation has none; "
            "give 'digits', a Hugging Face name, or a folder"
        )
    return folder


def _say(line: str) -> None:
    """Print a line once in a process, however often it loads the set."""
    if line not in _said:
        _said.add(line)
        print(line)


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


def _cut_all(
    pools: dict[str, Split],
    test: float | int | None,
    val: float | int | None,
    calibration: float | int | None,
    train: float | int | None,
    rng: np.random.Generator,
) -> tuple[dict[str, Split], dict[str, str]]:
    """The four splits and where each came from. Each amount is checked against the images that are left for it."""
    pools, origin = _name_pools(pools, test is not None and test == 1)
    if "test" not in pools:
        _check_available("test", test, len(pools["train"]), "images")
        pools["train"], pools["test"] = _cut(pools["train"], 0.2 if test is None else test, rng)
        origin["test"] = "cut from the only split"
    elif test is not None and test != 1.0:
        _check_available("test", test, len(pools["test"]), "test images")
        _, pools["test"] = _cut(pools["test"], test, rng)
        origin["test"] += f", a stratified part of {len(pools['test'])}"
    if len(pools["test"]) == 0:
        raise InputError(f"test = {test!r} leaves no test image; give a larger fraction or count")
    if train is not None:
        _check_available("train", train, len(pools["train"]), "images that the test split leaves")
        _, pools["train"] = _cut(pools["train"], train, rng)
        origin["train"] += f", a stratified part of {len(pools['train'])}"
    for key, amount in (("test", test), ("train", train)):
        if isinstance(amount, float) and 0 < amount < 1 and len(pools["train"]) == 0:
            raise InputError(
                f"{key} = {amount!r} of so few images leaves no training image; give counts, or more images"
            )
    left = f"training images ({origin['train']})"
    if "val" not in pools:
        _check_available("val", val, len(pools["train"]), left, keeps=1)
        pools["train"], pools["val"] = _cut(pools["train"], VAL if val is None else val, rng)
        origin["val"] = "cut from train"
    elif val is not None:
        _check_available("val", val, len(pools["val"]), "validation images")
        _, pools["val"] = _cut(pools["val"], val, rng)
        origin["val"] += f", a stratified part of {len(pools['val'])}"
    _check_available("calibration", calibration, len(pools["train"]), "training images that val leaves")
    _, pools["calibration"] = _cut(pools["train"], CALIBRATION if calibration is None else calibration, rng)
    origin["calibration"] = "part of train"
    return pools, origin


def _check_available(key: str, amount: float | int | None, available: int, what: str, keeps: int = 0) -> None:
    """Raise `InputError` if `amount` is more than `available`, or leaves fewer than `keeps` of them."""
    if amount is None or (isinstance(amount, float) and not keeps):
        return
    count = round(amount * available) if isinstance(amount, float) else amount
    if count and count > available - keeps:
        keep = f", and {keeps} of them has to stay" if keeps and available else ""
        raise InputError(
            f"{key} = {amount!r}: there are {available} {what}{keep}; give at most {max(0, available - keeps)}"
        )


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
