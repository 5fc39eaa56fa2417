"""What a saved model really costs and how well it answers: backends, accuracy, size, time, memory, energy.

The rooms `run`, `edge` and `cli` import `measure` from here, and what counts or times one thing alone.
A new metric is a group in `vitbench.measurement.measuring`; a new backend is an entry of `BACKENDS`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
