"""Nystroem and linear attention: against full attention, against the written-out form, with other methods, and what is refused."""

import copy

import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.measurement import backends
from vitbench.measurement.cost import macs_of
from vitbench.methods.linear_attention import LinearAttention as Linear
from vitbench.methods.nystroem import Nystroem
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, vit
from vitbench.model.layers import ExactNystroemAttention, LinearAttention, NystroemAttention
from vitbench.model.layers.attention import iterative_inverse, landmarks
from vitbench.removal import cut
from vitbench.training.config import TrainConfig

HEADS, WIDTH = 3, 16


@pytest.fixture(scope="module")
def model():
    """Attention that is not near uniform, in two blocks of 17 tokens."""
    made = vit.create_model("deit_tiny_patch16_224", img_size=64, num_classes=10, depth=2, seed=1)
    for block in made.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.15)
    return made.requires_grad_(False)


def layer(kind=NystroemAttention, **own):
    torch.manual_seed(0)
    made = kind(HEADS * WIDTH, HEADS, WIDTH, **own)
    torch.nn.init.normal_(made.qkv.weight, std=0.2)
    return made.requires_grad_(False)


def apart(model, other, size=64):
    torch.manual_seed(3)
    x = torch.randn(2, 3, size, size)
    return float((model(x) - other(x)).abs().max() / other(x).abs().max())


@pytest.mark.parametrize("class_token", ["apart", "averaged"])
def test_a_landmark_for_every_token_and_the_exact_inverse_are_full_attention(class_token, model):
    exact = Nystroem(landmarks=17, iterations=None, class_token=class_token)
    assert apart(compress(model, exact).model, model) < 1e-4
    assert apart(compress(model, exact.replace(landmarks=16)).model, model) > 1e-3


def test_it_is_the_three_matrices_of_the_paper():
    """Equation 13 with the class token as a landmark of its own, and its row full attention's."""
    nystroem, x = layer(landmarks=4, iterations=3, prefix=1), torch.randn(2, 10, HEADS * WIDTH)
    q, k, v = nystroem.qkv(x).reshape(2, 10, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    segments = [[0], [1, 2, 3], [4, 5, 6], [7, 8, 9]]
    few_q, few_k = (torch.stack([part[:, :, own].mean(2) for own in segments], 2) for part in (q, k))
    pairs = ((q, few_k), (few_q, few_k), (few_q, k), (q, k))
    left, middle, right, full = ((a @ b.transpose(-2, -1) / WIDTH**0.5).softmax(-1) for a, b in pairs)
    wanted = left @ iterative_inverse(middle, 3) @ right @ v
    wanted[:, :, 0] = (full @ v)[:, :, 0]
    wanted = nystroem.proj(wanted.transpose(1, 2).flatten(2))
    assert torch.allclose(nystroem(x), wanted, atol=1e-5)
    nystroem.fused_attn = False
    assert torch.allclose(nystroem(x), wanted, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_segments_follow_one_another_and_differ_by_one_at_most(prefix):
    x = torch.arange(float(11 + prefix))[None, None, :, None]
    found = landmarks(x, 4 + prefix, prefix).flatten().tolist()
    assert found == [*range(prefix), *(prefix + mean for mean in (0.5, 3, 6, 9))]
    assert torch.equal(landmarks(x, 11 + prefix, prefix), x)


def test_the_iterations_converge_to_the_inverse():
    torch.manual_seed(0)
    shares = (3 * torch.randn(2, 3, 12, 12)).softmax(-1).double()
    wanted = torch.linalg.pinv(shares)
    errors = [float((iterative_inverse(shares, count) - wanted).norm() / wanted.norm()) for count in (0, 2, 6, 12, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] > 0.1
    assert errors[-1] < 1e-6


def test_each_image_is_answered_by_itself():
    nystroem, x = layer(landmarks=5, prefix=1), torch.randn(3, 17, HEADS * WIDTH)
    x[2] *= 10
    assert torch.allclose(nystroem(x)[:1], nystroem(x[:1]), atol=1e-5)


def test_the_convolution_starts_at_nothing_and_spares_the_class_token():
    plain, x = layer(landmarks=5, prefix=1), torch.randn(2, 17, HEADS * WIDTH)
    for kind in (NystroemAttention, ExactNystroemAttention):
        with_it = layer(kind, landmarks=5, prefix=1, residual=3)
        assert with_it.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["residual.weight"]
        before = with_it(x)
        if kind is NystroemAttention:
            assert torch.allclose(before, plain(x), atol=1e-6)
        with_it.residual.weight[:] = torch.tensor([0.0, 1, 0]).view(1, 1, 3, 1)
        values = with_it.qkv(x)[..., 2 * HEADS * WIDTH :]
        values[:, 0] = 0
        wanted = before + torch.nn.functional.linear(values, with_it.proj.weight)
        assert torch.allclose(with_it(x), wanted, atol=1e-5)


def test_linear_attention_is_its_quadratic_form():
    linear, x = layer(LinearAttention), torch.randn(2, 9, HEADS * WIDTH)
    q, k, v = linear.qkv(x).reshape(2, 9, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    shares = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).transpose(-2, -1)
    wanted = (shares / shares.sum(-1, keepdim=True)) @ v
    assert torch.allclose(linear(x), linear.proj(wanted.transpose(1, 2).flatten(2)), atol=1e-5)


@pytest.mark.parametrize("tokens", [40, 80])
def test_multiply_accumulates_are_the_formulas(tokens):
    x, around = torch.randn(1, tokens, HEADS * WIDTH), 4 * tokens * (HEADS * WIDTH) ** 2
    m, t = 8, 3
    head = 4 * tokens * m * WIDTH - 2 * m * WIDTH + 2 * m * m * WIDTH + 4 * t * m**3  # the class token asks no landmark
    assert macs_of(layer(landmarks=m, iterations=t, prefix=1), x) == around + HEADS * head
    assert macs_of(layer(LinearAttention), x) == around + HEADS * (2 * tokens * WIDTH**2 + tokens * WIDTH)


@pytest.mark.parametrize(
    "config",
    [
        Nystroem(landmarks=5, iterations=2, class_token="averaged"),
        Nystroem(landmarks=6, residual=3, blocks=(0,)),
        Nystroem(landmarks=6, iterations=None),
        Linear(train=TrainConfig(epochs=0)),
    ],
    ids=["survey", "convolution", "exact", "linear"],
)
def test_saved_and_loaded_it_answers_the_same(config, model, tmp_path):
    small = compress(model, config).model
    loaded = artifact.load(artifact.save(small, tmp_path / "small"))
    assert apart(loaded, small) < 1e-6
    assert apart(small, model) > 1e-3


@pytest.mark.parametrize(
    "first",
    [
        ("dynamic_int8", {}),
        ("mixed_rank", {"keep": 0.5}),
        ("mixed_rank", {"keep": 0.5, "split_qkv": True}),
        ("uct", {"train": {"epochs": 0}, "joint": {"epochs": 0}}),
        ("pruning", {}),
    ],
    ids=lambda pair: pair[0],
)
def test_it_keeps_the_linear_layers_of_methods_before(first, base, digits, tmp_path):
    name, values = first
    values = {key: value for key, value in values.items() if key in make_config(name).to_dict()}
    before = compress(base.model, make_config(name, values), digits).model
    small = compress(before, [Nystroem(landmarks=6)], digits).model
    for old, new in zip(before.blocks, small.blocks, strict=True):
        assert type(new.attn.qkv) is type(old.attn.qkv)
        assert type(new.attn.proj) is type(old.attn.proj)
    loaded = artifact.load(artifact.save(small, tmp_path / "small"))
    assert apart(loaded, small, 8) < 2e-2
    assert small.recipe.method == f"{name}+nystroem"


def test_methods_that_come_after_find_the_linear_layers(base, digits, tmp_path):
    small = compress(base.model, [Nystroem(landmarks=6), make_config("dynamic_int8")], digits).model
    assert all(type(block.attn.qkv).__name__ == "DynamicInt8Linear" for block in small.blocks)
    assert apart(artifact.load(artifact.save(small, tmp_path / "small")), small, 8) < 2e-2


@pytest.mark.slow
def test_training_wins_back_what_it_lost(base, digits):
    from vitbench.training.loop import evaluate

    train = {"train": {"epochs": 1}}
    for config in (Nystroem(landmarks=3, class_token="averaged"), Linear(train=TrainConfig(epochs=0))):
        free = compress(base.model, config, digits).model
        trained = compress(base.model, make_config(free.recipe.method, config.to_dict() | train), digits)
        assert len(trained.history) == 1
        assert evaluate(trained.model, digits.val).top1.mean() > evaluate(free, digits.val).top1.mean()


def test_landmarks_by_default(model):
    assert compress(model, Nystroem()).model.blocks[0].attn.landmarks == 4
    large = vit.create_model("deit_tiny_patch16_224", depth=1)
    assert compress(large, Nystroem()).model.blocks[0].attn.landmarks == 32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"landmarks": 0}, "landmarks = 0: Input should be greater than or equal to 1"),
        ({"landmarks": 18}, "landmarks = 18: deit_tiny_patch16_224 has 17 tokens, of which 1 are .* give 2 to 17"),
        ({"landmarks": 1}, "landmarks = 1: .* give 2 to 17"),
        ({"iterations": 0}, "iterations = 0"),
        ({"residual": 4}, "residual = 4: give an odd width"),
        ({"blocks": (0, 2)}, r"blocks = \(0, 2\): deit_tiny_patch16_224 has blocks 0 to 1"),
        ({"train": {"epochs": 1}}, "training needs images"),
    ],
)
def test_wrong_settings(values, message, model):
    with pytest.raises(InputError, match=message):
        compress(model, make_config("nystroem", values))


@pytest.mark.parametrize("config", [Nystroem(landmarks=4), Linear(train=TrainConfig(epochs=0))])
def test_attention_that_cannot_be_replaced_says_why(config, model):
    merged = compress(model, make_config("token_merging")).model
    with pytest.raises(InputError, match="reduces tokens .* give the model before its tokens were reduced"):
        compress(merged, config)
    twice = compress(model, Nystroem(landmarks=4, blocks=(1,))).model
    with pytest.raises(InputError, match=r"blocks.1 of deit_tiny_patch16_224 is a Block with a NystroemAttention"):
        compress(twice, config)
    normed = copy.deepcopy(model)
    normed.blocks[0].attn.q_norm = torch.nn.LayerNorm(64)
    with pytest.raises(InputError, match="the attention in blocks.0 of .* has a q_norm"):
        compress(normed, config)


def test_in_the_last_block_a_class_token_apart_gets_full_attentions_answer(model):
    assert apart(compress(model, Nystroem(landmarks=2, blocks=(1,))).model, model) < 1e-6
    assert apart(compress(model, Nystroem(landmarks=2, blocks=(1,), class_token="averaged")).model, model) > 1e-3


def test_pruning_after_it_says_why_it_cannot(model):
    with pytest.raises(InputError, match="a NystroemAttention, not a plain block .* before its attention was replaced"):
        cut.check_prunable(compress(model, Nystroem(landmarks=4)).model)


def test_what_exports_says_so(model):
    recipes = [
        artifact.recipe_of(compress(model, config).model)
        for config in (Nystroem(), Linear(train=TrainConfig(epochs=0)), Nystroem(iterations=None))
    ]
    for backend in ("onnxruntime", "openvino"):
        found = [backends.unsupported_reason(backend, recipe) for recipe in recipes]
        assert found == ["", "", f"{backend} does not support ExactNystroemAttention"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "config", [Nystroem(residual=3), Linear(train=TrainConfig(epochs=0))], ids=["nystroem", "linear"]
)
def test_backends_answer_as_eager_does(backend, config, base):
    pytest.importorskip(backend)
    with torch.inference_mode():
        backends.prepare(backend, compress(base.model, config).model, torch.randn(2, 3, 8, 8))
