"""Model input: preprocessing and augmentation."""

import numpy as np
import pytest
import torch

from vitbench.data.batches import _random_offsets, _shift, eval_batches, train_batches
from vitbench.data.splits import load_data
from vitbench.model.recipe import Preprocess

PLAIN = Preprocess(size=8, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")


def test_eval_batches_are_in_order_and_normalised(digits):
    x, y = next(eval_batches(digits.test, PLAIN, batch_size=16))
    assert (y.numpy() == digits.test.labels[:16]).all()
    assert torch.allclose(x[3], torch.from_numpy(digits.test.array[3]).permute(2, 0, 1) / 127.5 - 1)


def test_large_images_go_through_timms_eval_transform(image_folder):
    from timm.data import create_transform

    data = load_data(image_folder(size=(90, 70)), test=1.0)
    preprocess = Preprocess(size=32, mean=(0.4,) * 3, std=(0.2,) * 3, crop_pct=0.9)
    x, _ = next(eval_batches(data.test, preprocess, batch_size=4))
    own = create_transform(32, mean=(0.4,) * 3, std=(0.2,) * 3, crop_pct=0.9, interpolation="bicubic")
    assert torch.equal(x[2], own(data.test[2][0]))


def test_shift_moves_whole_images_and_fills_with_black():
    image = torch.zeros(200, 8, 8, 3, dtype=torch.uint8)
    image[:, 3, 4] = 255
    moved = _shift(image, _random_offsets(200, 8, "shift", torch.Generator().manual_seed(0))[:, :2].T)
    rows, columns = torch.nonzero(moved[..., 0])[:, 1:].T
    assert set(rows.tolist()) == {2, 3, 4}
    assert set(columns.tolist()) == {3, 4, 5}
    assert (moved.flatten(1).sum(1) == 3 * 255).all()


@pytest.mark.parametrize("augment", ["none", "shift", "shift-flip", "timm"])
def test_an_epoch_is_decided_by_its_seed(digits, augment):
    few = load_data("digits", train=45).train

    def epoch(seed):
        return [(x, y) for x, y in train_batches(few, PLAIN, 16, augment, seed)]

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert len(first) == 2
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_images_are_enlarged_to_the_models_input(digits):
    x, _ = next(eval_batches(digits.test, PLAIN.replace(size=32, interpolation="bicubic"), batch_size=2))
    assert x.shape == (2, 3, 32, 32)
    assert np.abs(x.numpy()).max() <= 1.0


def test_no_draw_of_timms_augmentation_fails(digits):
    one = digits.train.subset(64)
    for seed in range(12):  # 768 images, two operations each: posterize at its strongest comes up
        for x, _ in train_batches(one, PLAIN, 64, "timm", seed):
            assert torch.isfinite(x).all()
