"""T2T-ViT: the published size, and that what exists for ViTs applies to it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vitbench.base.errors import InputError
from vitbench.data.splits import load_data
from vitbench.measurement.cost import count_macs, count_params
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, vit
from vitbench.model.layers import PackedLinear
from vitbench.model.t2t import SPLITS, TokenLayer, TokensToToken, sinusoids

FEW_IMAGES = pytest.mark.filterwarnings("ignore:.*calibration images give")
RIVAL = {"keep": 0.6, "compensation": "none", "gradient_weight": 0, "allocation": "uniform"}


@pytest.fixture(scope="module")
def tiny():
    return vit.create_model("t2t_vit_t_14", img_size=32, depth=2, num_classes=10)


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [("t2t_vit_t_14", 21.5e6, 6.1e9), ("t2t_vit_t_19", 39.2e6, 9.8e9), ("t2t_vit_t_24", 64.1e6, 15.0e9)],
)
def test_sizes_are_the_published_ones(name, params, macs):
    """Within 3 % of the table "T2T-ViT Models" in the README of github.com/yitu-opensource/T2T-ViT."""
    model = vit.meta_model(vit.Architecture(name=name, num_classes=1000, img_size=224))
    assert count_params(model) == pytest.approx(params, rel=0.03)
    assert vit.analytic_macs(model) == pytest.approx(macs, rel=0.03)


@pytest.mark.parametrize("size", [32, 49])
def test_counted_macs_are_those_of_the_formula(size):
    model = vit.create_model("t2t_vit_t_14", img_size=size, depth=2)
    assert count_macs(model) == pytest.approx(vit.analytic_macs(model), rel=0.01)


def test_macs_of_the_embedding_by_hand():
    """3136, 784 and 196 tokens at 224 pixels."""
    first = 3136 * (3 * 147 * 64 + 3 * 64**2) + 2 * 3136**2 * 64
    second = 784 * (3 * 576 * 64 + 3 * 64**2) + 2 * 784**2 * 64
    with torch.device("meta"):
        assert TokensToToken(224, embed_dim=384).macs() == first + second + 196 * 576 * 384


def test_without_attention_the_splits_are_convolutions(images):
    embed = TokensToToken(32, embed_dim=5)
    embed.layers = torch.nn.ModuleList(torch.nn.Linear(width, 64) for width in (147, 576))
    x = images
    for linear, (kernel, stride, padding) in zip([*embed.layers, embed.proj], SPLITS):
        weight = linear.weight.unflatten(1, (-1, kernel, kernel))
        x = F.conv2d(x, weight, linear.bias, stride=stride, padding=padding)
    assert x.shape == (3, 5, *embed.grid_size)
    assert torch.allclose(embed(images), x.flatten(2).transpose(1, 2), atol=1e-5)


def test_the_values_are_the_skip_connection():
    layer, x = TokenLayer(147), torch.randn(2, 9, 147)
    torch.nn.init.zeros_(layer.attn.proj.weight)
    torch.nn.init.zeros_(layer.attn.proj.bias)
    torch.nn.init.zeros_(layer.mlp.fc2.weight)
    torch.nn.init.zeros_(layer.mlp.fc2.bias)
    values = layer.norm1(x) @ layer.attn.qkv.weight[128:].T
    assert torch.allclose(layer(x), values, atol=1e-5)


def test_positions_start_from_sinusoids(tiny):
    codes = sinusoids(5, 384)
    assert torch.equal(tiny.pos_embed[0], codes)
    assert tiny.pos_embed.requires_grad
    assert codes[3, 0] == pytest.approx(math.sin(3))
    assert codes[3, 5] == pytest.approx(math.cos(3 / 10000 ** (4 / 384)))


def test_fused_and_written_out_attention_agree(tiny, images):
    modules = [module for module in tiny.patch_embed.modules() if hasattr(module, "fused_attn")]
    assert len(modules) == 2, "the embedding's own attention is switched too"
    answers = []
    for fused in (False, True):
        vit.set_fused_attention(tiny, fused)
        assert all(module.fused_attn == fused for module in modules)
        answers.append(tiny(images))
    assert torch.allclose(*answers, atol=1e-5)


def test_scale_and_norms_are_the_official_ones_but_in_files_of_early_versions(tiny, tmp_path):
    assert [layer.attn.scale for layer in tiny.patch_embed.layers] == [147**-0.5, 576**-0.5]
    assert {module.eps for module in tiny.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-5}
    loaded = artifact.load(artifact.save(tiny, tmp_path / "new"))
    assert [layer.attn.scale for layer in loaded.patch_embed.layers] == [147**-0.5, 576**-0.5]
    early = copy.deepcopy(tiny)
    early.recipe = early.recipe.replace(architecture=early.recipe.architecture.replace(token_attention=None))
    assert "token_attention" not in early.recipe.to_dict()["architecture"]
    loaded = artifact.load(artifact.save(early, tmp_path / "early"))
    assert [layer.attn.scale for layer in loaded.patch_embed.layers] == [64**-0.5, 64**-0.5]


def test_a_recipe_that_claims_this_form_for_another_model_is_refused(tmp_path):
    model = vit.create_model("vit_micro_patch2_8", num_classes=4)
    model.recipe = model.recipe.replace(architecture=model.recipe.architecture.replace(token_attention="official"))
    with pytest.raises(InputError, match="token_attention is a form of T2T-ViT"):
        artifact.load(artifact.save(model, tmp_path / "other"))


def test_preprocessing():
    found = vit.create_model("t2t_vit_t_14", depth=1).recipe.preprocess
    assert (found.size, found.interpolation, found.crop_pct) == (224, "bicubic", 0.9)
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_saved_and_loaded_it_answers_the_same(tiny, images, tmp_path):
    loaded = artifact.load(artifact.save(tiny, tmp_path / "t2t"))
    assert loaded.recipe.architecture == tiny.recipe.architecture
    original = copy.deepcopy(tiny).requires_grad_(
        False
    )  # as a loaded model; weights with gradients take another kernel
    assert torch.equal(loaded(images), original(images))


def test_checkpoints(tiny, images, tmp_path):
    save_file({key: value.contiguous() for key, value in tiny.state_dict().items()}, tmp_path / "t2t.safetensors")
    same = {"depth": 2, "num_classes": 10, "checkpoint": tmp_path / "t2t.safetensors"}
    again = vit.create_model("t2t_vit_t_14", img_size=32, seed=1, **same)
    assert torch.equal(again(images), tiny(images))
    assert vit.create_model("t2t_vit_t_14", img_size=64, **same).pos_embed.shape == (1, 17, 384)
    with pytest.raises(InputError, match="of another architecture"):
        vit.create_model("t2t_vit_t_19", img_size=32, **same)


@FEW_IMAGES
@pytest.mark.parametrize(("method", "config"), [("dynamic_int8", {}), ("mixed_rank", RIVAL), ("weight_only", {})])
def test_methods_apply_to_it(method, config, tiny, images, tmp_path):
    data = load_data("digits", calibration=64)
    small = compress(tiny, make_config(method, config), data).model
    path = artifact.save(small, tmp_path / method)
    answers = small(images)
    assert torch.isfinite(answers).all()
    assert not torch.equal(answers, tiny(images))
    assert torch.allclose(artifact.load(path)(images), answers, atol=2e-2 * answers.abs().max())
    assert artifact.size_on_disk(path) < artifact.size_on_disk(artifact.save(tiny, tmp_path / "whole"))
    assert isinstance(small.patch_embed.proj, PackedLinear) == (method == "weight_only"), "an end of the model"
    assert type(small.patch_embed.layers[0].attn.qkv) is torch.nn.Linear, "the embedding's layers stay as they are"


@FEW_IMAGES
def test_a_budget_of_macs_counts_the_embedding(tiny):
    config = make_config("mixed_rank", RIVAL | {"keep": 0.8, "budget": "macs", "allocation": "greedy"})
    small = compress(tiny, config, load_data("digits", calibration=64)).model
    assert 0.77 <= count_macs(small) / count_macs(tiny) <= 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "t2t_vit_t_14", "img_size": 2}, "2 pixels is too small.*allowed: 3 pixels or more"),
        ({"name": "t2t_vit_t_14", "pretrained": True}, "no pretrained weights for 't2t_vit_t_14'"),
        ({"name": "t2t_vit_t_15"}, "did you mean 't2t_vit_t_1"),
    ],
)
def test_models_that_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        vit.create_model(**arguments)


def test_the_smallest_image():
    model = vit.create_model("t2t_vit_t_14", img_size=3, depth=1)
    assert model(torch.zeros(1, 3, 3, 3)).shape == (1, 1000)


def test_embeddings_and_images_that_are_refused(tiny):
    with pytest.raises(InputError, match="patch_size=8.*allow patch_size=16"):
        TokensToToken(32, patch_size=8)
    with pytest.raises(InputError, match="images of 40x32 pixels were given to a model for 32x32"):
        tiny(torch.zeros(1, 3, 40, 32))
