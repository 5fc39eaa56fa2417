"""Channels are smoothed only where that does not change the outputs, in every kind of block."""

import dataclasses

import pytest
import torch
from timm.layers import DiffAttention, GluMlp, RmsNorm, SwiGLU
from timm.models import vision_transformer as timm_blocks
from timm.models.vision_transformer import VisionTransformer

from vitbench.calibration import quantizers
from vitbench.methods.registry import compress, make_config
from vitbench.methods.static_int8 import _smooth_channels
from vitbench.model import blocks, vit
from vitbench.model.recipe import Architecture, Preprocess, Recipe

BOTH, NONE = {"attn.qkv", "mlp.fc1"}, set()
KINDS = {  # what the model is made with -> layers that a LayerNorm alone feeds
    "pre-norm": ({}, BOTH),
    "post-norm": ({"block_fn": timm_blocks.ResPostBlock}, NONE),
    "post-norm, small scales": ({"block_fn": timm_blocks.ResPostBlock, "init_values": 1e-5}, NONE),
    "LayerScale": ({"init_values": 1e-5}, BOTH),
    "parallel": ({"block_fn": timm_blocks.ParallelScalingBlock}, NONE),
    "parallel things": ({"block_fn": timm_blocks.ParallelThingsBlock}, NONE),
    "norms of queries": ({"qk_norm": True}, BOTH),
    "norms inside": ({"scale_attn_norm": True, "scale_mlp_norm": True}, BOTH),
    "no bias": ({"qkv_bias": False}, BOTH),
    "RMS norm": ({"norm_layer": RmsNorm}, NONE),
    "gated MLP": ({"mlp_layer": GluMlp}, BOTH),
    "SwiGLU": ({"mlp_layer": SwiGLU}, {"attn.qkv"}),
    "registers": ({"reg_tokens": 4}, BOTH),
    "norm before": ({"pre_norm": True}, BOTH),
    "differential attention": ({"attn_layer": DiffAttention}, BOTH),
}


def make(**changes):
    """A tiny model of a kind with weights and norms far from their start."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=4, num_classes=10, **changes)
    for name, tensor in model.named_parameters():
        if tensor.ndim > 1:
            tensor.data += 0.1 * torch.randn(tensor.shape)
        elif "norm" in name:
            tensor.data *= torch.linspace(0.1, 3, tensor.numel()) if "weight" in name else 1
    architecture = Architecture(name="vit_micro_patch2_8", num_classes=10, img_size=8)
    preprocess = Preprocess(size=8, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    model.recipe = Recipe(architecture=architecture, preprocess=preprocess, origin={"start": "random"})
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def few(digits):
    return dataclasses.replace(digits, calibration=digits.calibration.subset(32))


@pytest.mark.filterwarnings("ignore:the inputs of blocks")
@pytest.mark.parametrize("kind", KINDS)
def test_the_float_models_answers_stay(kind, few):
    changes, expected = KINDS[kind]
    model, x = make(**changes), torch.randn(4, 3, 8, 8)
    assert {name.split(".", 2)[2] for name in blocks.preceding_norms(model)} == expected
    layers = vit.linear_layers(model)
    before, weights = model(x), {name: layer.weight.clone() for name, layer in layers.items()}
    _smooth_channels(model, layers, quantizers.channel_ranges(model, layers, few.calibration), 0.5)
    assert float((model(x) - before).abs().max()) <= 1e-4 * float(before.abs().max()), kind
    changed = {name.split(".", 2)[2] for name, layer in layers.items() if not torch.equal(layer.weight, weights[name])}
    assert changed == expected


def test_static_int8_of_post_norm_blocks_says_what_it_leaves_and_answers_as_before(few):
    model, x = make(block_fn=timm_blocks.ResPostBlock), torch.randn(16, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"channels are not smoothed \(4 of 8 layers\)"):
        small = compress(model, make_config("static_int8"), few).model
    assert float((small(x) - model(x)).std() / model(x).std()) < 0.1
