"""vitbench: compress Vision Transformers, measure what it really costs, and compare.

```python
data = load_data("digits")
base = baseline("vit_mini_patch2_8", data)
small = compress(base.model, make_config("dynamic_int8"), data)
path = save(small, "out/int8")
rows = measure(path, data, Run("out"), versus=base.path)
```
"""

from vitbench.artifact import load, save, size_on_disk
from vitbench.cache import Made, baseline, compressed
from vitbench.data import ImageData, Split, load_data
from vitbench.errors import InputError
from vitbench.measure import measure
from vitbench.methods import METHODS, compress, make_config
from vitbench.records import Row
from vitbench.row_table import load_records
from vitbench.runs import Run
from vitbench.training import TrainConfig, evaluate, train
from vitbench.version import __version__
from vitbench.vit import create_model

__all__ = [
    "METHODS",
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
    "load",
    "load_data",
    "load_records",
    "make_config",
    "measure",
    "save",
    "size_on_disk",
    "train",
]
