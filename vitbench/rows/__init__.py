"""Rows: their schema, reading and writing, results folders, statistics, and tables and sentences made from rows.

Figures and all rooms that measure import it; it imports `base` alone.
A new field of a row goes into `vitbench.rows.records`, with a new schema version.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
