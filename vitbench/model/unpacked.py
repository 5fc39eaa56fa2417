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
        InputError: `path` is no saved model, or it has other runtime layers than packed weights.
    """
    path = Path(path).expanduser()
    model, manifest = artifact.load(path), artifact.read_manifest(path)
    for name in manifest.recipe.layers:
        layer = model.get_submodule(name)
        if not (isinstance(layer, PackedConv2d) or isinstance(layer, PackedLinear) and _is_plain(layer)):
            raise InputError(
                f"{str(path)!r} cannot be a start: its {name} is a {type(layer).__name__}, and only packed weights become "
                "dense again; give an uncompressed model, or one of the method weight_only"
            )
        vit.replace_module(model, name, _dense(layer))
    recipe = manifest.recipe
    origin = {**recipe.origin, "start": f"{path.name}:{manifest.sha256[:12]}", "head": "same"}
    model.recipe = recipe.replace(layers={}, methods=(), origin=origin, storage="float32", original="")
    return model.requires_grad_(True).eval()


def _is_plain(layer: PackedLinear) -> bool:
    return isinstance(layer.input, nn.Identity)


def _dense(layer: PackedLinear | PackedConv2d) -> nn.Module:
    """A dense layer with the decoded weight and the bias of a packed one."""
    bias, weight = layer.bias is not None, layer.dense()
    if isinstance(layer, PackedLinear):
        dense: nn.Module = nn.Linear(layer.in_features, layer.out_features, bias=bias)
    else:
        out, channels, kernel, _ = layer.shape
        dense = nn.Conv2d(channels, out, kernel, stride=kernel, bias=bias)
    state = {"weight": weight} | ({"bias": layer.bias} if bias else {})
    dense.load_state_dict(state)
    return dense
