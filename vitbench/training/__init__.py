"""The training loop and its config, distillation from a teacher, fine-tuning after compression, and training of coded weights.

The rooms `removal`, `methods` and those above import `train`, `evaluate`, `TrainConfig` and `fine_tune` from here.
A new term of the loss or a new schedule is a field of `TrainConfig` and a few lines of the loop.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
