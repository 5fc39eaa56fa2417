"""vitbench: compress Vision Transformers, measure what it really costs, and compare.

```python
data = load_data("digits")
base = baseline("vit_mini_patch2_8", data)
small = compress(base.model, make_config("dynamic_int8"), data)
path = save(small, "out/int8")
rows = measure(path, data, Run("out"), versus=base.path)
```

The names that every use needs are here, the others in the rooms: `vitbench.figures.save_figure`. The stub beside each
`__init__.py` says what is public; a name is imported when it is first used, so that `vitbench --help` does not wait for PyTorch.
"""

import lazy_loader

from vitbench.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
