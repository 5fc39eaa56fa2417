"""Sizes of blocks: cut against masked, counted MACs, saved and loaded; and fewer tokens on the way."""

import copy

import numpy as np
import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.measurement.cost import count_macs
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, blocks, tokens, vit
from vitbench.model.recipe import BlockShape
from vitbench.removal import cut
from vitbench.removal.cut import KeptUnits
from vitbench.removal.policy import PolicySpace, mac_cost

REDUCTIONS = ("cls_attention", "hsic", "hsic_cls", "merge", "ward")


def random_kept(model, seed, head_dims=True):
    generator = torch.Generator().manual_seed(seed)

    def some(count, of):
        return torch.randperm(of, generator=generator)[:count].sort().values

    kept = []
    for shape in blocks.block_shapes(model):
        width = shape.head_dim - 5
        inside = {name: torch.stack([some(width, shape.head_dim) for _ in range(shape.heads)]) for name in ("qk", "v")}
        heads = some(int(torch.randint(1, shape.heads + 1, (1,), generator=generator)), shape.heads)
        kept.append(KeptUnits(some(shape.neurons // 3, shape.neurons), heads, **inside if head_dims else {}))
    return kept


@pytest.fixture(scope="module")
def deit():
    """DeiT-Tiny's blocks with biases and norms that are not at their start."""
    model = vit.create_model("deit_tiny_patch16_224", img_size=64, num_classes=10, depth=4)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("head_dims", [True, False])
def test_a_cut_model_answers_as_the_masked_one(seed, head_dims, deit, tmp_path):
    x, kept = torch.randn(2, 3, 64, 64), random_kept(deit, seed, head_dims)
    with cut.masked(deit, kept):
        wanted = deit(x)
    assert not torch.allclose(deit(x), wanted, atol=1e-2)
    small = copy.deepcopy(deit)
    cut.remove_units(small, kept)
    loaded = artifact.load(artifact.save(small, tmp_path / "small"))
    for model in (small, loaded):
        for fused in (True, False):
            vit.set_fused_attention(model, fused)
            assert torch.allclose(model(x), wanted, atol=1e-4)
    assert vit.analytic_macs(loaded) == pytest.approx(count_macs(loaded), rel=0.01)
    assert artifact.size_on_disk(tmp_path / "small") < artifact.size_on_disk(artifact.save(deit, tmp_path / "dense"))


def test_a_masked_model_is_back_to_itself_afterwards(deit):
    x = torch.randn(1, 3, 64, 64)
    before = deit(x)
    with cut.masked(deit, random_kept(deit, 0)):
        pass
    assert torch.equal(deit(x), before)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fewer_tokens_saved_counted_and_fused(reduction, deit, tmp_path):
    small = copy.deepcopy(deit)
    blocks.reduce_tokens(small, reduction, [None, 12, None, 7])
    blocks.record_block_shapes(small)
    if reduction.startswith("hsic"):
        small.blocks.scores.copy_(torch.rand(17))
    loaded, x = artifact.load(artifact.save(small, tmp_path / "small")), torch.randn(2, 3, 64, 64)
    assert torch.allclose(loaded(x), small(x), atol=1e-5)
    states = loaded.blocks.states(
        tokens.TokenState(vit.embed_patches(loaded, x), source=torch.arange(17).expand(2, -1))
    )
    assert [state.x.shape[1] for state in states] == [17, 17, 12, 12, 7]
    assert (states[-1].source[:, 0] == 0).all()
    assert states[-1].source.max() == 6
    assert vit.analytic_macs(loaded) == pytest.approx(count_macs(loaded), rel=0.01)
    fused = loaded(x)
    vit.set_fused_attention(loaded, False)
    assert torch.allclose(loaded(x), fused, atol=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_tokens_kept_is_the_identity(reduction, deit):
    same = copy.deepcopy(deit)
    blocks.reduce_tokens(same, reduction, [None, 17, 17, None])
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(same(x), deit(x), atol=1e-5)


def test_attention_of_equal_keys_counts_merged_tokens_as_often_as_they_are(deit):
    """Two equal tokens and one of size 2 in their place give the same answer."""
    attn, x = deit.blocks[0].attn, torch.randn(1, 5, 192)
    double = torch.cat([x, x[:, -1:]], dim=1)
    sizes = torch.tensor([[1.0, 1, 1, 1, 2]])
    assert torch.allclose(tokens.attention_with_qk(attn, x, sizes)[0], attn(double)[:, :5], atol=1e-5)
    assert torch.allclose(tokens.attention_with_qk(attn, x)[0], attn(x), atol=1e-5)


def test_kept_tokens_are_the_best_in_order_and_the_rest_is_their_mean():
    x = torch.arange(7.0).reshape(1, 7, 1)
    scores = torch.tensor([[0.0, 5, 1, 4, 0, 3, 2]])
    state = tokens.keep_and_fuse(tokens.TokenState(x, source=torch.arange(7)[None]), scores, 5, prefix=1)
    assert state.x.flatten().tolist() == [0, 1, 3, 5, (2 + 4 + 6) / 3]
    assert state.source.tolist() == [[0, 1, 4, 2, 4, 3, 4]]


def test_merging_averages_by_size_and_spares_the_class_token():
    keys = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 2, 3])).float()[None, None]
    x = torch.tensor([1.0, 2, 3, 4, 5, 6]).reshape(1, 6, 1)
    sizes = torch.tensor([[1.0, 1, 3, 1, 1, 1]])
    state = tokens.bipartite_soft_matching(tokens.TokenState(x, sizes, source=torch.arange(6)[None]), keys, 1, prefix=1)
    assert state.x.flatten().tolist() == pytest.approx([1, 5, 2, (3 * 3 + 4) / 4, 6])
    assert state.sizes.tolist() == [[1, 1, 1, 4, 1]]
    assert state.source.tolist() == [[0, 2, 3, 3, 1, 4]]


def dense(name):
    return vit.meta_model(vit.Architecture(name=name, num_classes=1000, img_size=224))


@pytest.mark.parametrize(("name", "giga"), [("deit_small_patch16_224", 4.541), ("deit_base_patch16_224", 17.447)])
def test_macs_of_the_dense_blocks(name, giga):
    model = dense(name)
    ends = model.patch_embed.proj.weight.numel() * 196 + model.embed_dim * 1000
    assert (vit.analytic_macs(model) - ends) / 1e9 == pytest.approx(giga, abs=1e-3)


def paper_tokens(rho):
    """Tokens before each of twelve blocks and after its attention, as the paper's code counts them: no fused token."""
    left = [int(197 * (1 - rho) ** k) for k in range(4)]
    return [left[k] for k in (0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3)], [
        left[k] for k in (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
    ]


SMALL_HEADS = [5, 5, 5, 4, 5, 5, 5, 5, 4, 5, 5, 5]
SMALL_NEURONS = [1348, 1533, 1517, 782, 1376, 1032, 1505, 1130, 1498, 964, 1016, 1037]
BASE_HEADS = [9, 6, 7, 6, 10, 11, 9, 11, 10, 10, 11, 7]


def test_macs_of_the_released_policy_of_deit_small():
    """The policy in searched_policy.py of the paper's public code: 1.863 G."""
    found = blocks.block_macs(np.array(SMALL_HEADS), 64, np.array(SMALL_NEURONS), *paper_tokens(0.488), 384)
    assert found / 1e9 == pytest.approx(1.863, rel=0.005)


def test_macs_of_the_released_policy_of_deit_base():
    """Its neurons are not known to us block by block, only that all parameters are 66.40 M: 6.938 G lies within what
    that number of neurons allows, and is met by neurons that follow from it with the early blocks cut more."""
    before, after = paper_tokens(0.401)
    attention = 4 * 768 * 64 * sum(BASE_HEADS)
    ends = (
        17.41e6 - 4 * 384 * 64 * sum(SMALL_HEADS) - 2 * 384 * sum(SMALL_NEURONS)
    )  # what the code counts beside blocks
    neurons = (66.40e6 - attention - 2 * ends) / (2 * 768)
    room = np.full(12, 1536.0)  # at most half of 3072 goes
    for order in (np.argsort(after), np.argsort(after)[::-1]):
        left, counts = neurons - room.sum(), room.copy()
        for index in order:
            counts[index] += min(left, 1536.0)
            left -= counts[index] - 1536.0
        found = blocks.block_macs(np.array(BASE_HEADS), 64, counts.astype(int), before, after, 768) / 1e9
        assert (found > 6.938) == (order[0] == np.argsort(after)[::-1][0])


def test_the_policys_cost_is_the_models(deit):
    space = PolicySpace(np.full(4, 768), np.full(4, 3), np.full(4, 64), 17, 1, (1, 2, 3))
    policy = np.array([0.3, 0.1, 0.2, 0.5, 0.4, 0.0, 0.5, 0.1, 0.25, 0.0, 0.5, 0.1, 0.35])
    counts = space.counts(policy)
    cost = mac_cost(192, "cls_attention", 1)(counts)[0]
    shapes = [
        BlockShape(heads=h, head_dim=w, neurons=n, tokens=m)
        for (n, h, w), m in zip(counts.units_left(), counts.tokens_out[0].tolist(), strict=True)
    ]
    model = vit.meta_model(deit.recipe.architecture.replace(blocks=tuple(shapes), reduction="cls_attention"))
    ends = model.patch_embed.proj.weight.numel() * 16 + 1920
    assert cost == vit.analytic_macs(model) - ends


def test_what_cannot_be_pruned_says_why(base, deit):
    int8 = compress(base.model, make_config("dynamic_int8")).model
    with pytest.raises(InputError, match="is a DynamicInt8Linear, not a plain linear layer; prune first"):
        cut.check_prunable(int8)
    one = deit.recipe.architecture.replace(blocks=blocks.block_shapes(deit)[:1])
    with pytest.raises(InputError, match="sizes of 1 blocks were given and deit_tiny_patch16_224 has 4"):
        vit.meta_model(one)
    normed = copy.deepcopy(deit)
    normed.blocks[0].attn.q_norm = torch.nn.LayerNorm(64)
    with pytest.raises(InputError, match="normalises queries over a head's 64 dimensions"):
        cut.remove_units(normed, random_kept(normed, 0))
    normed.blocks[0].attn.norm = torch.nn.LayerNorm(192)
    with pytest.raises(InputError, match=r"has attn.norm inside its blocks"):
        cut.check_prunable(normed)


def test_quantization_and_low_rank_take_a_pruned_model(base, digits, tmp_path):
    configs = [make_config("pruning"), make_config("weight_only", {"bits": 4})]
    small = compress(base.model, configs, digits).model
    loaded = artifact.load(artifact.save(small, tmp_path / "both"))
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(loaded(x), small(x), atol=1e-3)
