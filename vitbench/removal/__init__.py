"""Pruning: scores of units, their removal with compensation, and the search for a policy within a budget.

Methods import the pruner, the criteria and the search from here.
A new criterion is a function in `vitbench.removal.criteria` under its name in the table at the end of that file.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
