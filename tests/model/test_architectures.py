"""Vision Transformers that are not DeiT's shape: each method compresses them rightly, or says in one line that it does not."""

import pytest
import timm
import torch

from vitbench.base.errors import InputError
from vitbench.data.splits import load_data
from vitbench.measurement.cost import count_macs
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, blocks, vit
from vitbench.model.recipe import Architecture, Preprocess, Recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration images give")

SHAPES = {
    "gated MLP": ("vit_giant_patch14_dinov2", 28),
    "differential attention": ("vit_dlittle_patch16_reg1_gap_256", 32),
    "norms behind": ("vit_base_patch16_rpn_224", 32),
    "plain": ("vit_base_patch16_siglip_256", 32),
}
METHODS = {
    "pruning": {},
    "multidimensional": {"keep": 0.8, "search": {"how": "one_ratio"}},
    "token_merging": {},
    "nystroem": {},
    "static_int8": {},
    "dynamic_int8": {},
    "simulated_integer": {},
    "weight_only": {"bits": 4, "rounding": "second_order"},
    "mixed_rank": {"keep": 0.8, "budget": "macs", "rank_step": 1},
}
SAME_MACS = ("static_int8", "dynamic_int8", "simulated_integer", "weight_only")


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are slower with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def narrow(name, size):
    """timm's architecture of that name with two narrow blocks and random weights."""
    torch.manual_seed(0)
    model = timm.create_model(name, embed_dim=32, num_heads=2, depth=2, img_size=size, num_classes=10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    architecture = Architecture(name=name, num_classes=10, img_size=size, depth=2)
    model.recipe = Recipe(architecture=architecture, preprocess=Preprocess(size=size, mean=(0.5,) * 3, std=(0.5,) * 3))
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def few():
    return load_data("digits", calibration=32)


@pytest.mark.parametrize("shape", list(SHAPES)[:3])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_compresses_it_or_refuses_in_one_line(method, shape, few):
    name, size = SHAPES[shape]
    model, x = narrow(name, size), torch.randn(2, 3, size, size)
    wanted, macs = model(x), count_macs(model)
    try:
        small = compress(model, make_config(method, METHODS[method]), few).model
    except InputError as error:
        problem = str(error)
    else:
        problem = ""
        assert torch.isfinite(small(x)).all()
        if method in SAME_MACS:
            assert torch.nn.functional.cosine_similarity(small(x), wanted).min() > 0.9
            assert vit.analytic_macs(small) == pytest.approx(macs, rel=0.01)
        elif method == "mixed_rank":
            assert count_macs(small) <= 0.8 * macs
        elif method in ("pruning", "token_merging"):
            assert vit.analytic_macs(small) == pytest.approx(count_macs(small), rel=0.01)
    assert len(problem.splitlines()) <= 1
    if (method, shape) in {("pruning", "gated MLP"), ("multidimensional", "gated MLP")}:
        assert "neurons are pairs of outputs" in problem


def test_merged_tokens_of_a_gated_mlp_are_saved_and_loaded(tmp_path):
    """The sizes of its blocks count neurons, not the outputs that gate each other."""
    model = narrow("vit_giant_patch14_dinov2", 28)
    assert blocks.block_shapes(model)[0].neurons == model.blocks[0].mlp.fc2.in_features
    real = vit.meta_model(Architecture(name="vit_giant_patch14_dinov2", num_classes=10, img_size=28, depth=1))
    changed = Architecture(
        name="vit_giant_patch14_dinov2", num_classes=10, img_size=28, depth=1, blocks=blocks.block_shapes(real)
    )
    again = vit.meta_model(changed)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


def test_norms_behind_their_layers_are_not_taken_for_norms_before():
    assert blocks.preceding_norms(narrow(*SHAPES["norms behind"])) == {}
    assert len(blocks.preceding_norms(narrow(*SHAPES["plain"]))) == 4


def test_a_budget_of_macs_counts_the_tokens_that_each_layer_sees(few, tmp_path):
    """Behind merged tokens a weight saves less; what was counted in full there left too many weights."""
    model = vit.create_model("vit_micro_patch2_8", seed=1).requires_grad_(False)
    merged = compress(model, make_config("token_merging", {"r": 3}), few).model
    before = count_macs(merged)
    small = compress(merged, make_config("mixed_rank", {"keep": 0.7, "budget": "macs", "rank_step": 1}), few).model
    assert 0.68 * before <= count_macs(small) <= 0.7 * before
    assert count_macs(artifact.load(artifact.save(small, tmp_path / "small"))) == count_macs(small)
