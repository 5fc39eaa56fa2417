"""The runtime layers by name, and what a saved model needs of each."""

from torch import nn

RUNTIME_LAYERS: dict[str, type[nn.Module]] = {}


def runtime_layer(cls: type[nn.Module]) -> type[nn.Module]:
    """Make a layer class known to saved models under its own name.

    Such a class has `spec()` (its constructor's arguments, JSON types), `param_count` (weights and biases, however many
    bits each takes; steps and zero points are not weights) and, where it stands for a matrix, `dense()` (that matrix). One that leans on a module which several layers share
    also has `connect(shared)`, called with the model's shared modules by name once they are there.
    """
    RUNTIME_LAYERS[cls.__name__] = cls
    return cls
