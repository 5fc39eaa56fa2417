"""Pictures and pages, made from rows alone.

Notebooks and the command line import the functions that draw; this room imports `rows` and `base`.
A new figure is a function from rows to a figure and its table, and an entry of the gallery if the command line draws it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
