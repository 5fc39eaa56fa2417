"""Runs of many models: lessons and the suite, sweeps, cached models, searches for combinations, verification.

Only the command line imports it, and notebooks through `vitbench`.
A new kind of run is a module here that calls the rooms below and writes rows.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
