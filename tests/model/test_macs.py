"""Multiply-accumulates from shapes are those that run, for every kind of Vision Transformer that is listed."""

import pytest
import torch
from torch import nn

from vitbench.base.errors import InputError
from vitbench.measurement.cost import count_macs, macs_of
from vitbench.model import names, vit


def kind(model):
    """What a formula can depend on: the types inside, what is gated, pooled and put in front."""
    block, embed = model.blocks[0], model.patch_embed
    parts = [model, block, block.attn, block.mlp, embed, embed.proj, getattr(embed, "backbone", None), model.attn_pool]
    sizes = block.mlp.fc1.out_features / block.mlp.fc2.in_features, model.num_prefix_tokens, hasattr(model, "head_dist")
    return (*map(type, parts), *sizes, model.global_pool, isinstance(model.fc_norm, nn.Identity))


@pytest.fixture(scope="module")
def one_of_each_kind():
    """The names that are listed, one for each kind."""
    kinds = {}
    for name in names.model_names():
        with torch.device("meta"):
            model = names.construct(name, False, weight_init="skip", depth=1, num_classes=10)
        kinds.setdefault(kind(model), name)
    return list(kinds.values())


@pytest.mark.slow
def test_the_formula_counts_what_runs_in_every_kind_of_model(one_of_each_kind):
    assert len(one_of_each_kind) > 20
    for name in one_of_each_kind:
        with torch.device("meta"):
            whole = names.construct(name, False, weight_init="skip", depth=1, num_classes=10)
            side = (
                whole.patch_embed.img_size[0]
                if hasattr(whole.patch_embed, "backbone")
                else 3 * whole.patch_embed.feat_ratio()
            )
            model = names.construct(name, False, weight_init="skip", depth=1, num_classes=10, img_size=side).eval()
            counted = macs_of(model, torch.zeros(1, 3, side, side))
        assert vit.analytic_macs(model) == pytest.approx(counted, rel=0.01), name


@pytest.mark.slow
def test_listed_names_are_those_that_can_be_made():
    listed = names.model_names()
    assert {"vit_mini_patch2_8", "t2t_vit_t_14", "deit_tiny_patch16_224", "vit_giant_patch14_dinov2"} <= set(listed)
    for name in ("vit_base_patch16_xp_224", "vit_base_patch16_18x2_224", "vit_relpos_base_patch16_224"):
        assert name not in listed, name


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("vit_pwee_patch16_reg1_gap_256", "ParallelScalingBlock"),
        ("vit_dpwee_patch16_reg1_gap_256", "DiffParallelScalingBlock"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
    ],
)
def test_parallel_blocks_are_refused_and_not_counted(name, block):
    with pytest.raises(InputError, match=f"of type {block}, not attention"):
        vit.create_model(name, depth=1, num_classes=10)
    with torch.device("meta"):
        model = names.construct(name, False, depth=1)
    with pytest.raises(InputError, match=f"of type {block}"):
        vit.analytic_macs(model)


def test_a_model_whose_weights_want_gradients_is_counted():
    """Attention pooling expands a learned query, which the counter stumbled over."""
    model = vit.create_model("test_vit3", img_size=32, num_classes=10)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert count_macs(model) == vit.analytic_macs(model)


def test_gated_mlp_by_hand():
    """d = 1536, h = 4096 neurons of two outputs each, 2 x 2 patches of 14 pixels and a class token."""
    architecture = vit.Architecture(name="vit_giant_patch14_dinov2", num_classes=10, img_size=28, depth=1)
    block = 4 * 5 * 1536**2 + 2 * 5**2 * 1536 + 3 * 5 * 1536 * 4096
    assert vit.analytic_macs(vit.meta_model(architecture)) == block + 4 * 3 * 14**2 * 1536 + 10 * 1536


def test_differential_attention_by_hand():
    """Two softmaxes over half of a head's width each, whose difference mixes values of the whole width: 2 N^2 d as ever."""
    architecture = vit.Architecture(name="vit_dlittle_patch16_reg1_gap_256", num_classes=10, img_size=32, depth=1)
    model = vit.meta_model(architecture)
    d, h, n = model.embed_dim, model.blocks[0].mlp.fc1.out_features, 5
    assert vit.analytic_macs(model) == 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * h + 4 * 3 * 16**2 * d + 10 * d
