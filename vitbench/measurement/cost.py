"""Counts: weights, multiply-accumulates, bytes on disk, and the bytes that the bits per weight predict."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vitbench import artifact
from vitbench.layers import flop_formulas
from vitbench.measurement.value import Value
from vitbench.vit import set_fused_attention


def cost(path: Path) -> Iterator[Value]:
    """Count on the loaded model; `bytes` is the size of its folder."""
    model = artifact.load(path)
    yield Value("params", count_params(model), "measured: weights in the loaded model, scales not counted")
    yield Value("macs", count_macs(model), "measured: torch FlopCounterMode / 2, one image")
    yield Value("int8_macs", count_int8_macs(model), "measured: those of them whose two factors are 8-bit codes")
    yield Value("bytes", artifact.size_on_disk(path), "measured: files on disk")
    width = getattr(torch, model.recipe.storage).itemsize
    predicted = sum(
        tensor.numel() * (width if tensor.is_floating_point() else tensor.element_size())
        for tensor in model.state_dict().values()
    )
    yield Value("bytes_predicted", predicted, "modelled: weights x bits / 8, scales included, no headers")
    for part, size in artifact.parts(path).items():
        yield Value("part_bytes", size, f"measured: {part}")


def count_params(model: nn.Module) -> int:
    """Weights and biases, however many bits each takes. Steps and zero points are not weights."""
    inside = {name: module for name, module in model.named_modules() if hasattr(module, "param_count")}
    coded = sum(module.param_count for module in inside.values())
    dense = {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[0] not in inside}
    return coded + sum(tensor.numel() for tensor in dense.values())


def count_macs(model: nn.Module) -> int:
    """Multiply-accumulates for one image: convolutions, linear layers and attention products, by what really runs."""
    size = model.recipe.preprocess.size
    return macs_of(model, torch.zeros(1, 3, size, size))


@torch.inference_mode()
def count_int8_macs(model: nn.Module) -> int:
    """Those of them whose two factors are 8-bit codes, as a backend with integer kernels multiplies them."""
    counts = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        counts.append(layer.code_macs(inputs[0], y))

    hooks = [layer.register_forward_hook(count) for layer in model.modules() if hasattr(layer, "code_macs")]
    size = model.recipe.preprocess.size
    model(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return sum(counts)


@torch.no_grad()
def macs_of(module: nn.Module, x: Tensor) -> int:
    """Likewise of any module for the input x."""
    set_fused_attention(module, False)  # some versions of torch count the fused kernel as nothing
    fixed = {
        name: parameter.detach() for name, parameter in module.named_parameters()
    }  # the counter hooks onto gradients
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        functional_call(module, fixed, (x,))
    return counter.get_total_flops() // 2
