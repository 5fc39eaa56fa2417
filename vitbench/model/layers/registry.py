"""The runtime layers by name, and what a saved model needs of each."""

from torch import Tensor, nn

RUNTIME_LAYERS: dict[str, type[nn.Module]] = {}


def runtime_layer(cls: type[nn.Module]) -> type[nn.Module]:
    """Make a layer class known to saved models under its own name.

    Such a class has `spec()` (its constructor's arguments, JSON types) and, where it stands for a matrix, `dense()`
    (that matrix). One with weights that are not plain floating-point tensors has `param_count` (weights and biases,
    however many bits each takes; steps and zero points are not weights). One that leans on a module which several
    layers share has `connect(shared)`, called with the model's shared modules by name once they are there. One that
    every backend can run, as one made of ordinary modules alone, says `portable = True`; one that only some can names
    their packages, `portable = ("onnxruntime",)`. One whose kernel torch.compile cannot look into says
    `compiles = False`. One that rounds what it is given says `rounds_inputs = True`: its answers in two backends may then
    be a code apart. One that multiplies 8-bit codes has `code_macs(x, y)`: how many multiply-accumulates of them a call takes. One that divides by tensors of
    its own names them in `divisors`: no rounding may make them 0. One whose answer to an image hangs on the other images of
    its batch says `sees_batch = True`.
    """
    RUNTIME_LAYERS[cls.__name__] = cls
    return cls


def matrix(module: nn.Module) -> Tensor:
    """The weight matrix (out, in) that a dense or a compressed linear layer stands for."""
    return module.dense() if hasattr(module, "dense") else module.weight
