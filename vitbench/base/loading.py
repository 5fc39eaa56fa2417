"""How many worker processes may load images here, and random draws that leave a process's own state alone."""

import contextlib
import multiprocessing
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from vitbench.base.forks import CAN_FORK

SHARED_MEMORY = Path("/dev/shm")  # batches come from the workers through it
MOST_WORKERS, BATCHES_EACH = 2, 3  # what a worker has loaded ahead of its turn, and what is being used
METHOD = "fork" if CAN_FORK else None  # a process that is not forked would run the user's script again


def workers(batch_bytes: int) -> int:
    """How many may load batches of so many bytes: 0 where they cannot be forked, or have no room for their batches."""
    if not CAN_FORK or multiprocessing.current_process().daemon:
        return 0
    with contextlib.suppress(OSError):
        room = shutil.disk_usage(SHARED_MEMORY).free // (BATCHES_EACH * batch_bytes)
        return min(MOST_WORKERS, room)
    return 0


@contextlib.contextmanager
def own_draws(seed: int) -> Iterator[None]:
    """Within the block Python, NumPy and PyTorch draw from `seed`; afterwards they go on as if nothing had been drawn."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
