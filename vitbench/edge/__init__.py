"""A cost model of devices and links, bundles that are measured on another device, and their rows and figures.

The rooms `run` and `cli` import it, and notebooks.
A new device or link is an entry of `profiles.yaml`, with its source.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
