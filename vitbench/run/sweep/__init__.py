"""Sweeps: the cells of a grid of models, methods and seeds, made and measured by workers, here or on a cluster.

The command line imports `drive` to plan and run one, and `grid` to read its file.
A new setting is a field of `Sweep` in `grid`, which checks it; `work` is what a worker does with a cell.
"""
