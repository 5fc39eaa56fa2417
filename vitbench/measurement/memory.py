"""The largest sum of tensors that are alive at once while a model answers."""

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_tensors(model: nn.Module, x: Tensor) -> int:
    """Bytes of the model's tensors and of all others alive at once, at most, while it answers `x`.

    It sees what operators return, not what a kernel allocates for itself.
    """
    resident = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in model.state_dict().values()
    }
    with LiveTensors() as live:
        model(x)
    return sum(resident.values()) + x.untyped_storage().nbytes() + live.peak


class LiveTensors(TorchDispatchMode):
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
