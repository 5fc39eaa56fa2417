"""The work of a cell: make its baseline and compressed model, or take them from the cache, and measure the file."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from vitbench.base.errors import InputError
from vitbench.data.splits import ImageData
from vitbench.measurement.measuring import measure
from vitbench.methods.registry import make_config
from vitbench.rows.records import read_rows
from vitbench.rows.runs import Run
from vitbench.run import cache, suite
from vitbench.run.sweep.grid import Cell, DataChoice


def open_images(cell: Cell) -> ImageData:
    """The images of a cell; the last ones stay loaded for the next cell."""
    return _images(json.dumps(cell.data.to_dict()))


@functools.lru_cache(maxsize=1)
def _images(choice: str) -> ImageData:
    data = DataChoice(**json.loads(choice))
    return suite.open_data(data.dataset, data.name, data.splits)


def make_base(values: dict[str, Any]) -> dict[str, Any]:
    """Make the cell's baseline, or find it in the cache."""
    cell = _cell(values)
    _baseline(cell, open_images(cell))
    return {}


def compress_and_measure(values: dict[str, Any]) -> dict[str, Any]:
    """Compress and measure the cell's model; returns its rows and their environments as JSON.

    Raises:
        InputError: settings that do not fit the model, or other images than those that the sweep was checked with.
    """
    cell = _cell(values)
    data = open_images(cell)
    if data.fingerprint != cell.fingerprint:
        raise InputError(
            f"the images of {data.name} are not those that the sweep was started with; give all workers the same"
        )
    cached = base = _baseline(cell, data)
    if cell.steps:
        cached = cache.compress_cached(base, [make_config(step.method, step.config) for step in cell.steps], data)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        measure(cached.path, data, run, cell.measures, versus=base.path if cell.steps else "")
        rows = read_rows(run.records)
        environments = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in Path(folder, "environments").glob("*.json")
        }
    return {"rows": [row.model_dump(mode="json") for row in rows], "environments": environments}


def _cell(values: dict[str, Any]) -> Cell:
    cell = Cell(**values)
    torch.set_num_threads(cell.measures.threads)
    return cell


def _baseline(cell: Cell, data: ImageData) -> cache.CachedModel:
    return cache.baseline(cell.model.name, data, cell.train, **cell.model.start())
