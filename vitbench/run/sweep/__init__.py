"""Sweeps: workers here or on a cluster make and measure the cells of a grid of models, data sets, methods and seeds.

The command line imports `drive` to plan and run one, and `grid` to read its file.
A new setting is a field of `Sweep` in `grid`, which checks it; `work` makes and measures a cell.
"""
