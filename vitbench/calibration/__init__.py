"""Statistics of the calibration set, and the codes, ranges, ranks and compensations fitted to them, without training.

Training, removal and methods import it; it imports `data`, `model` and `base`.
To add a fitting method, write a function from weights and moments to tensors, with its source in the docstring.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
