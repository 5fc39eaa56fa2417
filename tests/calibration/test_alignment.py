"""Alignment leaves every output as it was, and sorts what blocks are free to sort."""

import copy

import pytest
import torch
from torch import nn

from vitbench.calibration.alignment import align_blocks
from vitbench.data.splits import load_data
from vitbench.methods.linear_attention import LinearAttention
from vitbench.methods.nystroem import Nystroem
from vitbench.methods.registry import compress
from vitbench.methods.token_merging import TokenMerging
from vitbench.model import vit
from vitbench.training.config import TrainConfig


@pytest.fixture(scope="module")
def images():
    return load_data("photographs", train=80, val=0, test=10, calibration=48).calibration


def model_of(name, **options):
    model = vit.create_model(name, num_classes=10, img_size=32, seed=3, **options).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # biases and norms that are not 0 and 1
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224", "vit_mini_patch4_32"]
)
@pytest.mark.parametrize("biases", [True, False])
def test_outputs_stay_and_weights_change(name, biases, images):
    model = model_of(name)
    if not biases:
        for layer in vit.linear_layers(model).values():
            layer.bias = None
    before = copy.deepcopy(model)
    assert align_blocks(model, images) == {}
    x = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(model(x), before(x), atol=1e-4)
    for layer_name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        new, old = (m.blocks[1].get_submodule(layer_name).weight for m in (model, before))
        assert not torch.allclose(new, old, atol=1e-3), layer_name


def test_queries_and_keys_are_balanced_and_sorted(images):
    model = model_of("vit_mini_patch4_32")
    align_blocks(model, images)
    outputs = []
    model.blocks[2].attn.qkv.register_forward_hook(lambda _, x, y: outputs.append(y.flatten(0, 1)))
    from vitbench.data.batches import eval_batches

    with torch.inference_mode():
        for x, _ in eval_batches(images, model.recipe.preprocess, 16):
            model(x)
    query, key, value = torch.cat(outputs).double().unflatten(1, (3, 6, -1)).transpose(0, 1)
    for head in range(6):
        moments = query[:, head].T @ query[:, head] / len(query), key[:, head].T.cov(correction=0)
        for moment in moments:
            sizes = moment.diagonal()
            assert (sizes[:-1] >= 0.98 * sizes[1:]).all()
            assert float((moment - torch.diag(sizes)).abs().max()) < 0.02 * float(sizes.max())
        assert torch.allclose(*(moment.diagonal() for moment in moments), rtol=0.05, atol=0.01 * float(sizes.max()))
        spread = value[:, head].T.cov(correction=0).diagonal()
        assert (spread[:-1] >= 0.98 * spread[1:]).all()


def test_what_depends_on_its_coordinates_is_left_alone_and_named(images):
    model = model_of("vit_mini_patch4_32")
    for block, norm in ((model.blocks[0], "q_norm"), (model.blocks[2], "norm")):
        width = 32 if norm == "q_norm" else 192
        setattr(block.attn, norm, nn.LayerNorm(width))
        getattr(block.attn, norm).weight.data.uniform_(0.5, 1.5)
    before = copy.deepcopy(model)
    skipped = align_blocks(model, images)
    assert skipped == {
        "blocks.0.attn: q, k": "it has a q_norm, which depends on the coordinates",
        "blocks.2.attn": "it has a norm",
    }
    x = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(model(x), before(x), atol=1e-4)
    rows = slice(0, 2 * 192)  # queries and keys
    assert torch.equal(model.blocks[0].attn.qkv.weight[rows], before.blocks[0].attn.qkv.weight[rows])
    assert not torch.equal(model.blocks[0].attn.qkv.weight[384:], before.blocks[0].attn.qkv.weight[384:])
    assert torch.equal(model.blocks[2].attn.qkv.weight, before.blocks[2].attn.qkv.weight)


@pytest.mark.parametrize(
    ("config", "skipped", "reason"),
    [
        (TokenMerging(r=1), "attn: q, k", "tokens are matched by their keys"),
        (LinearAttention(train=TrainConfig(epochs=0)), "attn", "it is a LinearAttention, whose output depends"),
        (Nystroem(landmarks=2), "", ""),
    ],
)
def test_other_attention_keeps_its_outputs_too(images, config, skipped, reason):
    model = compress(model_of("vit_mini_patch4_32"), config).model
    before = copy.deepcopy(model)
    found = align_blocks(model, images)
    assert set(found) == ({f"blocks.{index}.{skipped}" for index in range(len(model.blocks))} if skipped else set())
    assert all(each.startswith(reason) for each in found.values())
    x = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(model(x), before(x), atol=1e-4)
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, before.blocks[0].mlp.fc1.weight)
