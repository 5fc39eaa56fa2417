"""A saved model of packed weights as the start of another: the same outputs from dense float32 weights."""

from pathlib import Path

from torch import nn

from vitbench.base.errors import InputError
from vitbench.model import artifact, vit
from vitbench.model.layers.packed import PackedConv2d, PackedLinear


def load_unpacked(path: str | Path) -> nn.Module:
    """Load a saved model with dense weights instead of packed ones; its recipe names the file as its origin.

    So a file of 8-bit weights, with a quarter of the bytes, can start training and other methods.

    Raises:
        InputError: `path` is no saved model, or another method than weight_only changed it: it would no longer be what a
            baseline's rows say.
    """
    path = Path(path).expanduser()
    model, manifest = artifact.load(path), artifact.read_manifest(path)
    recipe = manifest.recipe
    layers = {name: model.get_submodule(name) for name in recipe.layers}
    packed = all(isinstance(layer, PackedLinear | PackedConv2d) for layer in layers.values())
    if not packed or any(step.method != "weight_only" for step in recipe.methods):
        raise InputError(
            f"{str(path)!r} cannot be a baseline's start: it was made by {recipe.method}, and only packed weights become "
            "dense again; give an uncompressed model, or one of the method weight_only"
        )
    for name, layer in layers.items():
        vit.replace_module(model, name, _dense(layer))
    origin = {
        "start": f"{path.name}:{manifest.sha256[:12]}",
        "head": "same",
    }  # how that file was trained, its recipe says
    model.recipe = recipe.replace(layers={}, methods=(), origin=origin, storage="float32", original="")
    return model.requires_grad_(True).eval()


def _dense(layer: PackedLinear | PackedConv2d) -> nn.Module:
    """A dense layer with the decoded weight and the bias of a packed one."""
    has_bias = layer.bias is not None
    if isinstance(layer, PackedLinear):
        dense: nn.Module = nn.Linear(layer.in_features, layer.out_features, bias=has_bias)
    else:
        out, channels, kernel, _ = layer.shape
        dense = nn.Conv2d(channels, out, kernel, stride=kernel, bias=has_bias)
    dense.weight.data = layer.dense()
    if has_bias:
        dense.bias.data = layer.bias
    return dense
