"""Batches of model input: images resized, augmented and normalised, in a fixed order for a fixed seed.

Random draws do not change the state of the process's generators.
The number of worker processes that load images depends on the free shared memory.
"""

import contextlib
import multiprocessing
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from vitbench.base.errors import InputError
from vitbench.base.forks import CAN_FORK
from vitbench.data.splits import Split
from vitbench.model.recipe import Preprocess

FLOAT_BYTES = 4
Augment = Literal["none", "shift", "shift-flip", "timm"]
MAX_ASPECT_RATIO = 200  # of an image's longer side to its shorter one


def eval_batches(
    split: Split, preprocess: Preprocess, batch_size: int = 128, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in order: x (B, 3, size, size) float32, normalised, and labels (B,) int64.

    Images held in memory are resized in batches by torch. All others go through timm's eval transform.
    """
    if split.array is not None:
        images = torch.from_numpy(split.array)
        for start in range(0, len(split), batch_size):
            x = _to_input(images[start : start + batch_size].to(device), preprocess)
            yield x, torch.from_numpy(split.labels[start : start + batch_size]).to(device)
        return
    for x, y in _pil_loader(split, _timm_eval_transform(preprocess), preprocess.size, batch_size, order=None, seed=0):
        yield x.to(device), y.to(device)


def epoch_order(count: int, batch_size: int, seed: int) -> tuple[Tensor, ...]:
    """The shuffled indices of an epoch, (B,) for each batch; a last incomplete batch is dropped."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, count // batch_size) * batch_size].split(batch_size)


def train_batches(
    split: Split,
    preprocess: Preprocess,
    batch_size: int,
    augment: Augment,
    seed: int,
    device: str | torch.device = "cpu",
    view: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in the order that `epoch_order` draws from `seed`; shapes as in `eval_batches`.

    Args:
        augment: "shift" moves each image by up to an eighth of its height and fills with black; "shift-flip" also
            mirrors half of the images; "timm" is timm's training transform (random resized crop, flip, RandAugment,
            random erasing).
        view: a seed; the augmentation of an image then depends only on it and on the image's index in the split.
    """
    order = epoch_order(len(split), batch_size, seed)
    yield from _augmented(split, preprocess, order, augment, seed, view, device)


def view_batches(
    split: Split,
    preprocess: Preprocess,
    batch_size: int,
    augment: Augment,
    view: int,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order, augmented as in `train_batches` with the same `view`; shapes as in `eval_batches`."""
    yield from _augmented(split, preprocess, torch.arange(len(split)).split(batch_size), augment, view, view, device)


def _augmented(
    split: Split,
    preprocess: Preprocess,
    order: Sequence[Tensor],
    augment: Augment,
    seed: int,
    view: int | None,
    device: str | torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    if augment == "timm" or split.array is None:
        transform = _timm_train_transform(preprocess) if augment == "timm" else _timm_eval_transform(preprocess)
        indices, transform_seed = torch.cat(tuple(order)).tolist(), seed if view is None else view
        for x, y in _pil_loader(split, transform, preprocess.size, len(order[0]), order=indices, seed=transform_seed):
            yield x.to(device), y.to(device)
        return
    generator = torch.Generator().manual_seed((seed if view is None else view) + 1)
    images, labels = torch.from_numpy(split.array).to(device), torch.from_numpy(split.labels).to(device)
    all_offsets = None if view is None else _random_offsets(len(split), images.shape[1], augment, generator)
    for indices in order:
        x = images[indices.to(device)]
        offsets = (
            all_offsets[indices]
            if all_offsets is not None
            else _random_offsets(len(x), images.shape[1], augment, generator)
        )
        if augment != "none":
            x = _shift(x, offsets[:, :2].T)
        if augment == "shift-flip":
            x = torch.where(offsets[:, 2].bool().to(device)[:, None, None, None], x.flip(2), x)
        yield _to_input(x, preprocess), labels[indices.to(device)]


def _random_offsets(count: int, height: int, augment: Augment, generator: torch.Generator) -> Tensor:
    """Draws for `count` images, (count, 3): rows and columns to shift by, 0 .. 2 max_shift, and 1 to mirror, else 0."""
    shifts, mirrored = torch.zeros(2, count, dtype=torch.int64), torch.zeros(count)
    if augment != "none":
        shifts = torch.randint(0, 2 * _max_shift(height) + 1, (2, count), generator=generator)
    if augment == "shift-flip":
        mirrored = torch.rand(count, generator=generator).lt(0.5)
    return torch.stack([*shifts, mirrored.long()], dim=1)


def _to_input(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, size, size), normalised."""
    x = images.permute(0, 3, 1, 2).float() / 255
    if x.shape[-2:] != (preprocess.size, preprocess.size):
        mode = preprocess.interpolation
        smooth = {} if mode == "nearest" else {"antialias": True, "align_corners": False}
        x = F.interpolate(x, size=(preprocess.size, preprocess.size), mode=mode, **smooth).clamp(0, 1)
    mean, std = (torch.tensor(value, device=x.device)[:, None, None] for value in (preprocess.mean, preprocess.std))
    return (x - mean) / std


def _max_shift(height: int) -> int:
    return max(1, height // 8)


def _shift(images: Tensor, offsets: Tensor) -> Tensor:
    """Shift each of the images (B, H, W, 3) by its `offsets` - max_shift, (2, B) in pixels, and fill with zeros."""
    batch, height, width, _ = images.shape
    max_shift, offsets = _max_shift(height), offsets[:, :, None].to(images.device)
    padded = F.pad(images, (0, 0, max_shift, max_shift, max_shift, max_shift))
    row_index = offsets[0] + torch.arange(height, device=images.device)
    column_index = offsets[1] + torch.arange(width, device=images.device)
    image_index = torch.arange(batch, device=images.device)[:, None, None]
    return padded[image_index, row_index[:, :, None], column_index[:, None, :]]


def _timm_eval_transform(preprocess: Preprocess):
    from timm.data import create_transform

    return create_transform(
        input_size=preprocess.size,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
    )


def _timm_train_transform(preprocess: Preprocess):
    from timm.data import create_transform

    return create_transform(
        input_size=preprocess.size,
        is_training=True,
        # mmax9: at magnitude 10 posterize would keep 0 bits, which Pillow 13 refuses
        auto_augment="rand-m9-mstd0.5-mmax9-inc1",
        re_prob=0.25,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
    )


class _TransformedDataset:
    """A split with a transform, for a DataLoader. The random draws of an image depend only on `seed` and its index."""

    def __init__(self, split: Split, transform, seed: int):
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, int] | InputError:
        try:
            image, label = self.split[i]
            self._check_shape(image, i)
        except InputError as error:  # raised by `_pil_loader`, without a worker's traceback around it
            return error
        draw = (self.seed * 1_000_003 + i) % 2**32
        with fixed_seed(draw):
            return self.transform(image), label

    def _check_shape(self, image: Image.Image, i: int) -> None:
        """Raise `InputError` for a long thin image: resizing its shorter side to the input's size could take all memory."""
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise InputError(
                f"{self.split.source.location(int(self.split.indices[i]))}: the image is {image.size[0]} x {image.size[1]} pixels; "
                f"allowed: one side up to {MAX_ASPECT_RATIO} times the other; crop it or take it out"
            )


def _pil_loader(
    split: Split, transform, side: int, batch_size: int, order: list[int] | None, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    count = worker_count(batch_size * 3 * side * side * FLOAT_BYTES)
    loader = DataLoader(
        _TransformedDataset(split, transform, seed),
        batch_size=batch_size,
        sampler=order,
        num_workers=count,
        multiprocessing_context=START_METHOD if count else None,
        collate_fn=_collate,
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _collate(items: list[tuple[Tensor, int] | InputError]) -> list[Tensor] | InputError:
    """A batch, or the first error among its images."""
    return next((item for item in items if isinstance(item, InputError)), None) or default_collate(items)


SHARED_MEMORY = Path("/dev/shm")  # workers pass their batches through it
MAX_WORKERS, BATCHES_PER_WORKER = 2, 3  # a worker prefetches two batches while one is in use
START_METHOD = "fork" if CAN_FORK else None  # a spawned worker would run the user's script again


def worker_count(batch_bytes: int) -> int:
    """The number of worker processes for batches of this size; 0 without fork or without free shared memory."""
    if not CAN_FORK or multiprocessing.current_process().daemon:
        return 0
    with contextlib.suppress(OSError):
        workers_that_fit = shutil.disk_usage(SHARED_MEMORY).free // (BATCHES_PER_WORKER * batch_bytes)
        return min(MAX_WORKERS, workers_that_fit)
    return 0


@contextlib.contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and PyTorch inside the block, and restore their states afterwards."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
