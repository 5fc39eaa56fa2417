"""Sweeps: every combination of models, image sets, methods and seeds, run by several workers and taken up where it stopped.

`grid` reads a file into cells, `executors` has who runs them, `worker` is the process in which one runs, and `drive` puts
cells out and rows in.
"""
