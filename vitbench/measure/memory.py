"""Peak resident memory of a fresh process that loads the model and answers one image."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitbench.measure.child import in_child, job
from vitbench.measure.value import Value


def peak_rss(path: Path, threads: int) -> Iterator[Value]:
    """The peak, how much of it the imports alone take, and the largest sum of tensors alive at once."""
    found = in_child("answer_one_image", threads, path=str(path))
    yield Value(
        "peak_rss", found["peak"], "measured: peak of a fresh process that loads the file and answers one image"
    )
    yield Value("import_rss", found["imports"], "measured: peak of the same process after its imports")
    tensors = "measured: largest sum of tensors alive at once in one answer, the model's included"
    yield Value("peak_tensors", found["tensors"], tensors)


@job
def answer_one_image(path: str) -> dict[str, Any]:
    """Peak bytes after the imports and after one answer."""
    import torch

    from vitbench import artifact

    imports = peak_bytes()
    model = artifact.load(path)
    size = model.recipe.preprocess.size
    with torch.inference_mode():
        model(torch.randn(1, 3, size, size))
        peak = peak_bytes()
        return {"imports": imports, "peak": peak, "tensors": peak_tensors(model, torch.randn(1, 3, size, size))}


def peak_tensors(model: nn.Module, x: Tensor) -> int:
    """Bytes of the model's tensors and of all others alive at once, at most, while it answers `x`.

    It sees what operators return, not what a kernel allocates for itself.
    """
    resident = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in model.state_dict().values()
    }
    with _LiveTensors() as live:
        model(x)
    return sum(resident.values()) + x.untyped_storage().nbytes() + live.peak


class _LiveTensors(TorchDispatchMode):
    """Follows the storages that operators make, and the largest sum of those alive at once."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # a view's storage was there before
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: pair for key, pair in self.alive.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def peak_bytes() -> int:
    """This process's own peak. Linux's VmHWM, because ru_maxrss also holds the peak of the parent it was forked from."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
