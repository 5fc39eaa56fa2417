"""Pictures and pages, made from rows alone: this room imports `rows` and `base`.

Notebooks and the command line import the functions that draw.
A new figure is a function from rows to a figure and the rows that it shows, and an entry of `gallery.GALLERY` if the
command line draws it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
