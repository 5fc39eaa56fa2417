"""Images and labels: from a name or a folder to fingerprinted splits, and from these to batches.

The rooms above import splits and batches; it imports `model` for a model's preprocessing, and `base`.
A new source of images is a module that `vitbench.data.sources` opens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
