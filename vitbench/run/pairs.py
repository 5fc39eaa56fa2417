"""Which method may follow which: every ordered pair is tried on a small model, which takes half a minute."""

import contextlib
import io
import itertools
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from vitbench.base import progress
from vitbench.base.configs import Config
from vitbench.base.errors import InputError
from vitbench.data.splits import ImageData, load_data
from vitbench.measurement.cost import count_macs
from vitbench.methods.registry import METHODS, compress, make_config
from vitbench.model import artifact, vit

ONE_EPOCH = {"epochs": 1, "batch_size": 32, "warmup_epochs": 0, "mixup": 0.0}
SHORT: dict[str, dict[str, Any]] = {  # settings of methods that would take long on a small model
    "diffq": {"train": ONE_EPOCH},
    "distillation": {"train": ONE_EPOCH | {"views": 1}},
    "multidimensional": {
        "search": {"evaluations": 3, "first": 2, "pool": 20},
        "keep": 0.8,
        "tolerance": 0.2,
        "criterion": {"samples": 16},
    },
    "pruning": {"criterion": {"samples": 16}},
    "token_merging": {"r": 2},
    "weight_only": {"bits": 3, "rounding": "second_order"},
}


def short_config(name: str) -> Config:
    """A method's config that takes a moment on a small model; nothing is trained that need not be."""
    values = SHORT.get(name, {})
    if "train" in METHODS[name].config.model_fields:
        values = {"train": {"epochs": 0}} | values
    return make_config(name, values)


def list_pairs(data: ImageData | None = None) -> pd.DataFrame:
    """For each ordered pair of methods what the second does after the first.

    Returns:
        Columns `first`, `second`, `bytes` and `macs` (the shares that the second leaves), and `refused`: the reason, or "".
    """
    if data is None:
        with contextlib.redirect_stdout(io.StringIO()):
            data = load_data("digits", train=64, test=32, val=32, calibration=32)
    model = vit.create_model("vit_micro_patch2_8", num_classes=len(data.classes), seed=0)
    firsts = {name: _compressed(model, name, data) for name in METHODS}
    costs = {name: _cost(first) for name, first in firsts.items()}
    lines = []
    pairs = list(itertools.product(METHODS, METHODS))
    for first, second in progress.progress_bar(pairs, "pairs of methods", unit="pair"):
        shares, refused = (math.nan, math.nan), ""
        try:
            both = _compressed(firsts[first], second, data)
            (size, macs), (first_size, first_macs) = _cost(both), costs[first]
            shares = size / first_size, macs / first_macs
        except InputError as error:
            refused = str(error)
        lines.append((first, second, *shares, refused))
    return pd.DataFrame(lines, columns=["first", "second", "bytes", "macs", "refused"])


def _compressed(model: nn.Module, name: str, data: ImageData) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # there are few calibration images
        return compress(model, short_config(name), data).model


def _cost(model: nn.Module) -> tuple[int, int]:
    """Bytes of the saved model, and multiply-accumulates of the loaded one."""
    with tempfile.TemporaryDirectory() as folder:
        path = artifact.save(model, Path(folder, "model"))
        return artifact.size_on_disk(path), count_macs(artifact.load(path))


def pairs_text(pairs: pd.DataFrame) -> str:
    """The pairs as text for a terminal: under each first method a line for each second one."""
    names = list(dict.fromkeys(pairs["first"]))
    width = max(map(len, names))
    lines = ["bytes / MACs that the second method leaves of the first one's model, in per cent; - where it refuses", ""]
    for first in names:
        lines.append(f"{first}, then")
        for row in pairs[pairs["first"] == first].itertuples():
            what = f"- {row.refused}"[:100] if row.refused else f"{100 * row.bytes:4.0f} / {100 * row.macs:.0f}"
            lines.append(f"    {row.second:{width}}  {what}")
    return "\n".join(lines)
