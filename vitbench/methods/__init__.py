"""The compression methods, one file each: a config and a handler `(model, config, data) -> model`.

Import `compress` and `make_config` to use any of them, or a method's config by its class.
To add one, write a file with a function under `@register`; it is found by itself.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
