"""The compression methods, one file each: a config and a handler `(model, config, data) -> model`.

Import `compress` and `make_config` to use any of them, or the config class of one method.
To add a method, write a file with a function under `@register`, and `vitbench.methods.registry` finds it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
