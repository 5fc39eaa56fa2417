"""Pictures and pages, made from rows alone.

Notebooks and the command line import the functions that draw. This room imports `rows` and `base`.
A new figure is a function from rows to a figure and the rows that it shows. If the command line draws it, it is also an
entry of `gallery.GALLERY`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
