"""Shared pieces of the tests. Everything is written below a temporary home, whose notebooks are this checkout's."""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

_home = tempfile.TemporaryDirectory(prefix="vitbench-tests-")  # set before any import, for the kernels of notebooks too
(Path(_home.name) / "notebooks").symlink_to(ROOT / "notebooks")
os.environ["VITBENCH_HOME"] = _home.name
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

THREADS = 2
if "PYTEST_XDIST_WORKER" in os.environ:  # beside other workers one each, and for what they start
    THREADS = 1
    os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib as mpl  # noqa: E402
import torch  # noqa: E402

from vitbench.data.splits import load_data  # noqa: E402
from vitbench.model import vit  # noqa: E402
from vitbench.run.cache import baseline  # noqa: E402
from vitbench.training import loop  # noqa: E402
from vitbench.training.config import TrainConfig  # noqa: E402

torch.set_num_threads(THREADS)
mpl.use("Agg")  # here only: a kernel shows its figures in the notebook


@pytest.fixture(scope="session")
def home() -> Path:
    return Path(_home.name)


@pytest.fixture(scope="session")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def few_digits():
    """As many digits as a test needs that compares weights or keys bit for bit."""
    return load_data("digits", train=64, test=32, val=32, calibration=32)


@pytest.fixture(scope="module")
def micro():
    """An untrained model of two blocks."""
    return vit.create_model("vit_micro_patch2_8", num_classes=10, seed=0, depth=2)


@pytest.fixture(scope="session")
def base(digits):
    """A baseline that was trained a little, enough to be far from chance."""
    return baseline("vit_mini_patch2_8", digits, TrainConfig(epochs=10, mixup=0.0))


@contextlib.contextmanager
def stop_training(at):
    """`with stop_training(2): ...` has a training that saves after each epoch interrupted before its third."""
    whole = loop._TrainingRun.epoch

    def interrupted(self, epoch, *rest):
        if epoch == at:
            raise KeyboardInterrupt
        return whole(self, epoch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(loop._TrainingRun, "epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture
def stopped():
    return stop_training


@pytest.fixture
def image_folder(tmp_path):
    """Makes a folder of images, one sub-folder a class, optionally below split folders."""
    from PIL import Image

    def make(splits=("",), classes=("cat", "dog", "owl"), count=10, size=(12, 10), mode="RGB", name="set"):
        rng = np.random.default_rng(0)
        for split in splits:
            for label in classes:
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")
        return tmp_path / name

    return make
