"""vitbench: compress Vision Transformers, measure what it really costs, and compare.

```python
data = load_data("digits")
base = baseline("vit_mini_patch2_8", data)
small = compress(base.model, make_config("dynamic_int8"), data)
path = save(small, "out/int8")
rows = measure(path, data, Run("out"), versus=base.path)
```
"""

import importlib
from typing import TYPE_CHECKING, Any

from vitbench.version import __version__

if TYPE_CHECKING:
    from vitbench.artifact import load, save, size_on_disk
    from vitbench.bench import Bench
    from vitbench.cache import Made, baseline, compressed
    from vitbench.data import ImageData, Split, load_data
    from vitbench.errors import InputError
    from vitbench.measurement import measure
    from vitbench.methods import METHODS, compress, make_config
    from vitbench.notebook import lesson
    from vitbench.records import Row
    from vitbench.row_table import load_records
    from vitbench.runs import Run
    from vitbench.training import TrainConfig, evaluate, train
    from vitbench.vit import create_model

__all__ = [
    "METHODS",
    "Bench",
    "Made",
    "ImageData",
    "InputError",
    "Row",
    "Run",
    "Split",
    "TrainConfig",
    "__version__",
    "baseline",
    "compress",
    "compressed",
    "create_model",
    "evaluate",
    "lesson",
    "load",
    "load_data",
    "load_records",
    "make_config",
    "measure",
    "save",
    "size_on_disk",
    "train",
]

# where each name comes from; it is imported when it is first used, so that `vitbench --help` does not wait for PyTorch
_PLACES = {
    "artifact": ("load", "save", "size_on_disk"),
    "bench": ("Bench",),
    "cache": ("Made", "baseline", "compressed"),
    "data": ("ImageData", "Split", "load_data"),
    "errors": ("InputError",),
    "measurement": ("measure",),
    "methods": ("METHODS", "compress", "make_config"),
    "notebook": ("lesson",),
    "records": ("Row",),
    "row_table": ("load_records",),
    "runs": ("Run",),
    "training": ("TrainConfig", "evaluate", "train"),
    "vit": ("create_model",),
}


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            found = globals()[name] = getattr(importlib.import_module(f"vitbench.{module}"), name)
            return found
    raise AttributeError(f"module 'vitbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
