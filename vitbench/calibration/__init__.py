"""Statistics of images, and the codes, ranges, ranks and compensations that are fitted to them, without training.

Training, removal and methods import it; it imports `data`, `model` and `base`.
To add a way of fitting, write a function from weights and moments to tensors, with its source in the docstring.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
