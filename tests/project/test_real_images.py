"""Real photographs and real weights, where a checkout has them beside it; everything else is tested without them."""

import numpy as np
import pytest

from tests.conftest import SHARED
from vitbench.data.splits import load_data
from vitbench.methods.registry import compress, make_config
from vitbench.run.cache import baseline
from vitbench.training.config import TrainConfig
from vitbench.training.loop import evaluate

pytestmark = pytest.mark.slow

WEIGHTS = SHARED / "weights" / "deit_tiny_patch16_224.safetensors"
IMAGENET = SHARED / "data" / "imagenet-1k-sample"
CIFAR = SHARED / "data" / "cifar10"


@pytest.mark.skipif(
    not (WEIGHTS.exists() and IMAGENET.exists()), reason="needs DeiT-Tiny and an ImageNet sample in ../shared"
)
def test_deit_tiny_keeps_its_accuracy_in_int8():
    data = load_data(IMAGENET, test=1.0)
    base = baseline("deit_tiny_patch16_224", data, TrainConfig(epochs=0), checkpoint=WEIGHTS)
    fp32 = evaluate(base.model, data.test).top1.mean()
    int8 = evaluate(compress(base.model, make_config("dynamic_int8")).model, data.test).top1.mean()
    assert fp32 == pytest.approx(0.781, abs=0.002)
    assert abs(int8 - fp32) <= 0.015


@pytest.mark.skipif(not CIFAR.exists(), reason="needs CIFAR-10 in ../shared")
def test_cifar10_as_it_lies_in_a_folder():
    data = load_data(CIFAR)
    assert (len(data.classes), len(data.train), len(data.val), len(data.test)) == (10, 45_000, 5_000, 10_000)
    assert data.test.array.shape == (10_000, 32, 32, 3)
    assert (np.bincount(data.train.labels) == 4_500).all()
