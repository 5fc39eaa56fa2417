"""The runtime layers by name, and what a saved model needs of each."""

from torch import Tensor, nn

RUNTIME_LAYERS: dict[str, type[nn.Module]] = {}


def runtime_layer(cls: type[nn.Module]) -> type[nn.Module]:
    """Register a layer class under its own name, so that saved models can be loaded.

    The class has `spec()`: the constructor's arguments, in JSON types. Where they apply, it also has

    - `dense()`: the matrix that the layer stands for,
    - `param_count`: weights and biases, however many bits each takes, of a class whose weights are not plain floating-point
      tensors (steps and zero points are not counted),
    - `bind_shared(shared)`: takes what the layer needs from the model's shared modules, by name, once those exist,
    - `exportable`: True if every backend can run the layer, or the packages of the backends that can, as `("onnxruntime",)`,
    - `supports_torch_compile = False`: torch.compile cannot trace the layer's kernel,
    - `quantizes_inputs = True`: the layer rounds its inputs, so its outputs in two backends may differ by a code,
    - `int8_macs(x, y)`: the multiply-accumulates of one call whose factors are both 8-bit codes,
    - `divisors`: the names of its tensors that it divides by; rounding must not make them 0,
    - `depends_on_batch = True`: the output for an image depends on the other images of its batch.
    """
    RUNTIME_LAYERS[cls.__name__] = cls
    return cls


def dense_weight(module: nn.Module) -> Tensor:
    """The weight matrix (out, in) that a dense or a compressed linear layer stands for."""
    return module.dense() if hasattr(module, "dense") else module.weight
