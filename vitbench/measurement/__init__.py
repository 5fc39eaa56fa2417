"""The measured accuracy and cost of a saved model: backends, accuracy, size, time, memory, energy.

The rooms `run`, `edge` and `cli` import `measure` from here, and the functions that measure one metric alone.
A new metric is a group in `vitbench.measurement.measuring`; a new backend is an entry of `BACKENDS`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
