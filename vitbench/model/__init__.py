"""Vision Transformers: making, changing, saving and loading them, and the runtime layers of compressed ones (`layers`).

Import `vit` to make and change models, `artifact` to save and load them, `blocks` and `tokens` for the blocks' parts.
A new runtime layer goes into `layers` under `@runtime_layer`, so that a file loads without the method that made it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
