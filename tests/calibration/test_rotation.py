"""Rotation leaves every output as it was, and makes channels alike."""

import copy

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

from vitbench.base.errors import InputError
from vitbench.calibration.rotation import hadamard, orthogonal, rotate
from vitbench.measurement import backends
from vitbench.measurement.cost import count_macs
from vitbench.methods.linear_attention import LinearAttention
from vitbench.methods.nystroem import Nystroem
from vitbench.methods.registry import compress
from vitbench.methods.token_merging import TokenMerging
from vitbench.model import artifact, vit
from vitbench.model.layers import BiasedLinear, RMSNorm
from vitbench.training.config import TrainConfig

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def model_of(name, img_size=32, **options):
    model = vit.create_model(name, num_classes=10, img_size=img_size, seed=3, **options).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # biases and norms that are not 0 and 1
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def assert_same(model, before, x=X):
    with torch.inference_mode():
        assert torch.allclose(model(x), before(x), atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 16, 20, 24, 32, 40, 64, 192, 384, 448, 768, 1024])
def test_hadamard_matrices(size):
    matrix = hadamard(size)
    assert set(matrix.unique().tolist()) <= {1, -1}
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 12, 18, 64, 92])
def test_matrices_are_orthogonal_whether_or_not_there_is_a_hadamard_matrix(size):
    assert (hadamard(size) is None) == (size in (3, 18, 92))
    matrix = orthogonal(size, torch.Generator().manual_seed(0))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix, orthogonal(size, torch.Generator().manual_seed(0)))
    assert not torch.equal(matrix, orthogonal(size, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "vit_tiny_patch16_224",
        "vit_mini_patch4_32",
        "vit_medium_patch16_gap_240",  # no class token, mean pooling before fc_norm, LayerScale, no bias of qkv
        "vit_small_patch14_reg4_dinov2",  # registers, LayerScale
    ],
)
@pytest.mark.parametrize("biases", [True, False])
def test_outputs_stay_and_weights_change(name, biases):
    size = 28 if "patch14" in name else 32
    model, x = model_of(name, size, depth=3), X[..., :size, :size]
    if not biases:
        for layer in vit.linear_layers(model).values():
            layer.bias = None
    before = copy.deepcopy(model)
    assert rotate(model) == {}
    assert_same(model, before, x)
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    for layer_name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        new, old = (m.blocks[1].get_submodule(layer_name).weight for m in (model, before))
        assert not torch.allclose(new, old, atol=1e-3), layer_name
    assert isinstance(model.blocks[0].attn.qkv, BiasedLinear) == (before.blocks[0].attn.qkv.bias is None)


@pytest.mark.parametrize("name", ["vit_mini_patch4_32", "vit_medium_patch16_gap_240", "t2t_vit_t_14"])
def test_a_rotated_model_is_saved_loaded_and_counted(name, tmp_path):
    model = model_of(name, depth=2)
    macs = count_macs(model)
    rotate(model)
    loaded = artifact.load(artifact.save(model, tmp_path / "rotated"))
    assert isinstance(loaded.blocks[1].norm2, RMSNorm)
    assert loaded.blocks[1].norm2.eps == model.blocks[1].norm2.eps
    with torch.inference_mode():
        assert torch.allclose(loaded(X), model(X), atol=1e-5)
    assert count_macs(loaded) == macs


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_rotated_model_runs_in_other_backends(backend):
    pytest.importorskip(backend)
    model = model_of("vit_medium_patch16_gap_240", depth=1)
    rotate(model)
    assert backends.unsupported_reason(backend, artifact.recipe_of(model)) == ""
    assert backends.prepare_checked(backend, model, X)[1] < 1e-4


def test_a_channel_that_is_large_is_so_no_more():
    model = model_of("vit_mini_patch4_32")
    model.pos_embed.data[..., 7] += 50 * torch.randn(
        model.pos_embed.shape[1], generator=torch.Generator().manual_seed(2)
    )
    before = copy.deepcopy(model)
    rotate(model)
    with torch.inference_mode():
        sizes = [vit.embed_patches(each, X).flatten(0, 1).square().mean(0) for each in (before, model)]
    assert float(sizes[0].max() / sizes[0].mean()) > 100
    assert float(sizes[1].max() / sizes[1].mean()) < 5
    assert_same(model, before)


def test_the_seed_draws_the_signs():
    models = [model_of("vit_mini_patch4_32", depth=1) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        rotate(model, seed)
    weights = [model.blocks[0].mlp.fc1.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_norms_inside_attention_keep_their_parts_coordinates():
    model = model_of("vit_mini_patch4_32")
    for block, norm, width in ((model.blocks[0], "q_norm", 32), (model.blocks[2], "norm", 192)):
        setattr(block.attn, norm, nn.LayerNorm(width))
        getattr(block.attn, norm).weight.data.uniform_(0.5, 1.5)
    before = copy.deepcopy(model)
    assert rotate(model) == {
        "blocks.0.attn: q, k": "it has a q_norm, which depends on the coordinates",
        "blocks.2.attn: v": "it has a norm, which depends on the coordinates",
    }
    assert_same(model, before)


@pytest.mark.parametrize(
    ("config", "skipped"),
    [
        (TokenMerging(r=1), ""),
        (LinearAttention(train=TrainConfig(epochs=0)), "attn: q, k"),
        (Nystroem(landmarks=2), ""),
    ],
)
def test_other_attention_and_merged_tokens_keep_their_outputs_too(config, skipped):
    model = compress(model_of("vit_mini_patch4_32"), config).model
    before = copy.deepcopy(model)
    assert set(rotate(model)) == (
        {f"blocks.{index}.{skipped}" for index in range(len(model.blocks))} if skipped else set()
    )
    assert_same(model, before)


def change(name, value):
    return lambda model: vit.replace_module(model, name, value)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (change("blocks.1", ResPostBlock(192, 6)), r"blocks\.1 is a ResPostBlock"),
        (change("blocks.1.norm2", RMSNorm(192)), r"blocks\.1 has a RMSNorm as norm2"),
        (change("blocks.0.attn.gate", nn.Linear(192, 192)), r"blocks\.0 has a gate, which reads the tokens"),
        (change("blocks.0.mlp.fc1", nn.Identity()), r"blocks\.0 has no dense linear layer mlp\.fc1"),
        (change("blocks.0.ls1", nn.ReLU()), r"blocks\.0 has a ReLU as ls1"),
        (change("norm_pre", nn.LayerNorm(192)), "norm_pre writes the tokens"),
        (change("patch_embed.norm", nn.LayerNorm(192)), r"patch_embed\.norm writes the tokens"),
        (change("norm", nn.Identity()), "there are 0 norms before the head"),
        (change("norm", nn.BatchNorm1d(192)), "norm is a BatchNorm1d"),
        (change("head", nn.Identity()), "head is not a dense linear layer"),
        (lambda model: setattr(model, "global_pool", "max"), "the pooling 'max' depends on the coordinates"),
        (lambda model: setattr(model, "attn_pool", nn.Identity()), "attn_pool reads the tokens"),
        (lambda model: setattr(model, "__class__", type("Other", (VisionTransformer,), {})), "it is a Other"),
        (rotate, "blocks.0 has a RMSNorm as norm1"),
    ],
)
def test_what_cannot_absorb_a_rotation_is_refused_and_stays(harm, reason):
    model = model_of("vit_mini_patch4_32", depth=2)
    harm(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=f"vit_mini_patch4_32 cannot be rotated: {reason}.*give a plain ViT"):
        rotate(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
