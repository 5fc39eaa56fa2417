"""Token merging: schedules, what is left, prefix tokens, pictures of what went together, and what is refused."""

import copy

import pytest
import timm
import torch

from vitbench.base.errors import InputError
from vitbench.measurement.cost import count_macs
from vitbench.methods.nystroem import Nystroem
from vitbench.methods.pruning import Pruning
from vitbench.methods.registry import compress, make_config
from vitbench.methods.token_merging import TokenMerging
from vitbench.model import artifact, blocks, tokens, vit
from vitbench.removal.merge_schedule import constant, decreasing, tokens_after

# of pruning's settings: tokens alone, merged after every block, and no images
MERGED = {
    "reduction": "merge",
    "token_blocks": (0, 1, 2),
    "compensation": "none",
    "criterion": {"name": "magnitude"},
}


@pytest.fixture(scope="module")
def model():
    made = vit.create_model("deit_tiny_patch16_224", img_size=64, num_classes=10, depth=4, seed=1)
    return made.requires_grad_(False)


def test_the_schedules_merge_as_many_in_all():
    for r in (1, 4, 8, 13, 16):
        falling = decreasing(r, 12)
        assert constant(r, 12) == [r] * 12
        assert sum(falling) == 12 * r
        assert falling[0] == 2 * r
        assert falling[-1] == 0
        assert falling == sorted(falling, reverse=True)
    assert decreasing(3, 1) == [3]
    assert constant(2.5, 4) == [3, 2, 3, 2]


def test_at_most_half_of_the_tokens_go_and_two_stay():
    assert tokens_after([8] * 12, 197, 1) == [197 - 8 * i for i in range(1, 13)]
    assert tokens_after([100, 100, 3, 0], 197, 1) == [99, 50, 47, 47]  # 196 // 2 = 98, 98 // 2 = 49
    assert tokens_after([9] * 6, 5, 1) == [3, 2, 2, 2, 2, 2]
    assert tokens_after([9] * 4, 4, 0) == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (TokenMerging(), [15, 13, 11, 9]),
        (TokenMerging(r=3), [14, 11, 8, 5]),
        (TokenMerging(r=2, schedule="decreasing"), [13, 10, 9, 9]),
        (TokenMerging(r=(0, 5, 0, 1)), [17, 12, 12, 11]),
        (TokenMerging(r=50), [9, 5, 3, 2]),
    ],
)
def test_tokens_really_become_fewer(config, left, model, tmp_path):
    small = compress(model, config).model
    loaded = artifact.load(artifact.save(small, tmp_path / "small"))
    start = tokens.TokenState(
        vit.embed_patches(loaded, torch.randn(2, 3, 64, 64)), source=torch.arange(17).expand(2, -1)
    )
    states = loaded.blocks.states(start)
    assert [state.x.shape[1] for state in states[1:]] == left
    for state in states[1:]:
        if state.sizes is not None:
            assert (state.sizes.sum(1) == 17).all()
            counted = torch.stack([torch.bincount(row, minlength=state.x.shape[1]) for row in state.source])
            assert torch.equal(counted.float(), state.sizes)
        assert (state.source[:, 0] == 0).all()
        assert (state.source[:, 1:] > 0).all(), "the class token stays by itself"
    assert count_macs(loaded) < count_macs(model)
    assert vit.analytic_macs(loaded) == pytest.approx(count_macs(loaded), rel=0.01)


@pytest.mark.parametrize("r", [0, (0, 0, 0, 0)])
def test_no_pairs_leave_the_model_as_it_is(r, model):
    same = compress(model, TokenMerging(r=r)).model
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(same(x), model(x))
    assert not isinstance(same.blocks, tokens.TokenBlocks)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_prefix_tokens_stay_in_front_and_apart(prefix):
    """Twice, since what comes first after a merge must come first in the next."""
    torch.manual_seed(0)
    x = torch.randn(2, prefix + 9, 4)
    state = tokens.TokenState(x, source=torch.arange(prefix + 9).expand(2, -1))
    for pairs in (3, 2):
        state = tokens.bipartite_soft_matching(state, torch.randn(2, 3, state.x.shape[1], 8), pairs, prefix)
        assert torch.equal(state.x[:, :prefix], x[:, :prefix])
        assert torch.equal(state.source[:, :prefix], torch.arange(prefix).expand(2, -1))
    for image in range(2):
        for place in range(state.x.shape[1]):
            wanted = x[image][state.source[image] == place].mean(0)
            assert torch.allclose(state.x[image, place], wanted, atol=1e-5)


def test_a_model_with_two_prefix_tokens_is_merged():
    made = vit.create_model("deit_tiny_distilled_patch16_224", img_size=64, num_classes=10, depth=3)
    assert made.num_prefix_tokens == 2
    small = compress(made, TokenMerging(r=4)).model
    start = tokens.TokenState(vit.embed_patches(small, torch.randn(1, 3, 64, 64)), source=torch.arange(18)[None])
    assert small.blocks.states(start)[-1].source[0, :2].tolist() == [0, 1]


@pytest.fixture(scope="module")
def registers():
    """16 patches behind a class token and 4 registers."""
    return vit.create_model("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=10, depth=3)


POOLS = {  # of timm: the mean with a norm after it or before it, with a class token or without, and attention
    "avg": {"global_pool": "avg"},
    "avg, norm before": {"global_pool": "avg", "fc_norm": False},
    "avg without class token": {"global_pool": "avg", "class_token": False},
    "map": {"global_pool": "map"},
    "map without class token": {"global_pool": "map", "class_token": False},
}


def twins(pool):
    """A model that pools its tokens, without positions, and images whose patches come in equal pairs."""
    torch.manual_seed(0)
    made = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, depth=3, **POOLS[pool])
    made.recipe = vit.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, depth=3).recipe
    torch.nn.init.normal_(made.head.weight)
    with torch.no_grad():
        made.pos_embed[:, made.num_prefix_tokens :] = 0
    patches = torch.randn(2, 3, 4, 2, 16, 16).repeat_interleave(2, dim=3)
    return made.requires_grad_(False).eval(), patches.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 64, 64)


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_weights_a_token_by_what_was_merged_into_it(pool):
    made, x = twins(pool)
    before = made(x)
    small = compress(copy.deepcopy(made), TokenMerging(r=(3, 0, 0))).model
    assert torch.allclose(small(x), before, atol=1e-4), "equal tokens are one token that counts twice"
    assert small.recipe.architecture.pool_weights == "size"
    assert vit.analytic_macs(small) == count_macs(small)
    early = copy.deepcopy(small)
    early.blocks.restores = False
    assert not torch.allclose(early(x), before, atol=1e-2), "this test could not fail"


@pytest.fixture(scope="module")
def pooled():
    return vit.create_model("vit_medium_patch16_gap_240", img_size=64, num_classes=10, depth=3, seed=1)


def test_weighted_pooling_is_saved_and_early_files_keep_their_logits(pooled, tmp_path):
    small, x = compress(pooled, TokenMerging(r=3)).model, torch.randn(2, 3, 64, 64)
    loaded = artifact.load(artifact.save(small, tmp_path / "new"))
    assert torch.equal(loaded(x), small(x))
    assert loaded.blocks.restores
    early = copy.deepcopy(small)
    early.blocks.restores = False
    blocks.record_block_shapes(early)
    assert "pool_weights" not in early.recipe.to_dict()["architecture"]
    read = artifact.load(artifact.save(early, tmp_path / "early"))
    assert torch.equal(read(x), early(x))
    assert not torch.allclose(read(x), small(x), atol=1e-4)
    assert artifact.model_digest(early) != artifact.model_digest(small)


def test_pruning_that_merges_pools_by_size_too_and_a_class_token_needs_no_weights(pooled, model):
    config = Pruning(neurons=0, heads=0, tokens=0.25, **MERGED)
    assert compress(pooled, config).model.blocks.restores
    assert not compress(model, config).model.blocks.restores
    assert compress(model, config).model.recipe.architecture.pool_weights is None


def tokens_seen(model):
    """How many tokens the MLP of each block gets."""
    seen = []
    hooks = [block.norm2.register_forward_hook(lambda _, x, y: seen.append(x[0].shape[1])) for block in model.blocks]
    with torch.inference_mode():
        model(torch.zeros(1, 3, 56, 56))
    for hook in hooks:
        hook.remove()
    return seen


def noted(model):
    """What the recipe says of the same."""
    return blocks.tokens_per_block(model.recipe.architecture.blocks, vit.token_count(model))[1]


@pytest.mark.parametrize("config", [TokenMerging(r=6), Pruning(neurons=0, heads=0, tokens=0.25, **MERGED)])
def test_with_registers_the_tokens_noted_are_those_that_run(registers, tmp_path, config):
    small = compress(registers, config).model
    loaded = artifact.load(artifact.save(small, tmp_path / "small"))
    assert tokens_seen(small) == tokens_seen(loaded) == noted(loaded)
    assert noted(loaded)[-1] < 21
    assert vit.analytic_macs(loaded) == count_macs(loaded)


def test_fewer_tokens_than_pairs_can_leave_are_refused_or_noted_as_they_run(registers):
    with pytest.raises(
        InputError, match=r"leaves at least half of the tokens, besides the first 5 \(class and registers\)"
    ):
        compress(registers, Pruning(neurons=0, heads=0, tokens=0.45, **MERGED))
    asked = copy.deepcopy(registers)
    blocks.reduce_tokens(asked, "merge", [9, None, 7])  # 8 of 16 patches may go, then 4 of 8
    assert tokens_seen(asked) == [13, 13, 9]
    blocks.record_block_shapes(asked)
    assert noted(asked) == [13, 13, 9]


def test_it_comes_after_quantization(base, digits, tmp_path):
    small = compress(base.model, [make_config("dynamic_int8"), TokenMerging(r=2)], digits).model
    loaded, x = artifact.load(artifact.save(small, tmp_path / "small")), torch.randn(2, 3, 8, 8)
    assert torch.allclose(loaded(x), small(x), atol=2e-2 * small(x).abs().max())
    assert type(loaded.blocks[0].attn.qkv).__name__ == "DynamicInt8Linear"


@pytest.mark.slow
def test_it_is_trained_if_asked_to(base, digits):
    config = make_config("token_merging", {"r": 4, "train": {"epochs": 1}})
    result = compress(base.model, config, digits)
    small = result.model
    assert len(result.history) == 1
    assert not torch.equal(small.blocks[0].attn.qkv.weight, base.model.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": -1}, "greater than or equal to 0"),
        ({"r": (1, 2)}, r"r = \(1, 2\) has 2 numbers and deit_tiny_patch16_224 has 4 blocks"),
        ({"schedule": "rising"}, "schedule = 'rising'"),
    ],
)
def test_wrong_settings(values, message, model):
    with pytest.raises(InputError, match=message):
        compress(model, make_config("token_merging", values))


def test_models_that_cannot_merge_say_why(model):
    merged = compress(model, TokenMerging(r=1)).model
    with pytest.raises(InputError, match=r"this deit_tiny_patch16_224 reduces tokens already \(merge\)"):
        compress(merged, TokenMerging(r=1))
    with pytest.raises(InputError, match="is a Block with a NystroemAttention"):
        compress(compress(model, Nystroem(landmarks=4)).model, TokenMerging(r=1))
    gated = copy.deepcopy(model)
    gated.blocks[2].attn.gate = torch.nn.Linear(192, 192)
    with pytest.raises(InputError, match="blocks.2 of .* has a gate"):
        compress(gated, TokenMerging(r=1))
