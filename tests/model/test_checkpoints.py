"""Weights as people have them: every layout, where it lies, what is taken, and what is refused in one line."""

import argparse
import re

import pytest
import torch
from safetensors.torch import save_file

from vitbench.base.errors import InputError
from vitbench.cli import main
from vitbench.model import artifact, vit

MICRO = "vit_micro_patch2_8"
BLOCK = r"blocks\.(\d+)\."

# timm's names -> transformers', as ViTForImageClassification saves them (version 4, and version 5 as it names its modules)
V4 = {
    r"(cls_token)": r"vit.embeddings.\1",
    r"(dist_token)": r"vit.embeddings.distillation_token",
    r"pos_embed": "vit.embeddings.position_embeddings",
    r"patch_embed\.proj\.(\w+)": r"vit.embeddings.patch_embeddings.projection.\1",
    BLOCK + r"norm1\.(\w+)": r"vit.encoder.layer.\1.layernorm_before.\2",
    BLOCK + r"norm2\.(\w+)": r"vit.encoder.layer.\1.layernorm_after.\2",
    BLOCK + r"attn\.qkv\.(\w+)": r"vit.encoder.layer.\1.attention.attention.{query,key,value}.\2",
    BLOCK + r"attn\.proj\.(\w+)": r"vit.encoder.layer.\1.attention.output.dense.\2",
    BLOCK + r"mlp\.fc1\.(\w+)": r"vit.encoder.layer.\1.intermediate.dense.\2",
    BLOCK + r"mlp\.fc2\.(\w+)": r"vit.encoder.layer.\1.output.dense.\2",
    r"norm\.(\w+)": r"vit.layernorm.\1",
    r"head\.(\w+)": r"classifier.\1",
}
V5 = V4 | {
    BLOCK + r"norm1\.(\w+)": r"vit.layers.\1.layernorm_before.\2",
    BLOCK + r"norm2\.(\w+)": r"vit.layers.\1.layernorm_after.\2",
    BLOCK + r"attn\.qkv\.(\w+)": r"vit.layers.\1.attention.{q_proj,k_proj,v_proj}.\2",
    BLOCK + r"attn\.proj\.(\w+)": r"vit.layers.\1.attention.o_proj.\2",
    BLOCK + r"mlp\.(fc[12])\.(\w+)": r"vit.layers.\1.mlp.\2.\3",
}
V5 = {key: value for key, value in V5.items() if key not in (BLOCK + r"mlp\.fc1\.(\w+)", BLOCK + r"mlp\.fc2\.(\w+)")}
DEIT = {key: value.replace("vit.", "deit.").replace("classifier", "cls_classifier") for key, value in V4.items()}
DEIT |= {r"head_dist\.(\w+)": r"distillation_classifier.\1"}
DINO = {key: value.replace("vit.", "dinov2.") for key, value in V4.items()} | {
    BLOCK + r"norm([12])\.(\w+)": r"dinov2.encoder.layer.\1.norm\2.\3",
    BLOCK + r"ls([12])\.gamma": r"dinov2.encoder.layer.\1.layer_scale\2.lambda1",
    BLOCK + r"mlp\.(fc[12])\.(\w+)": r"dinov2.encoder.layer.\1.mlp.\2.\3",
}


def named(state, layout):
    """The state in another layout's names; the tensors of one that has {a,b,c} in its name are cut into parts."""
    found = {}
    for key, tensor in state.items():
        pattern = next(pattern for pattern in reversed(layout) if re.fullmatch(pattern, key))
        name = re.fullmatch(pattern, key).expand(layout[pattern])
        several = re.search(r"\{(.+)\}", name)
        parts = several[1].split(",") if several else [""]
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            found[re.sub(r"\{.+\}", part, name)] = piece.clone()
    return found


def under(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def changed(state, by=1.0):
    return {key: tensor + by for key, tensor in state.items()}


@pytest.fixture(scope="module")
def state():
    return vit.create_model(MICRO, seed=5).state_dict()


@pytest.fixture
def loads(tmp_path):
    """Writes what is given and makes a model from it."""

    def load(content, name=MICRO, file="weights.pth", **arguments):
        path = tmp_path / file
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
        return vit.create_model(name, checkpoint=path, **arguments)

    return load


def assert_same(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(own[key], tensor), key


@pytest.mark.parametrize("layout", [V4, V5], ids=["transformers4", "transformers5"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_transformers_names(layout, prefix, state, loads):
    model = loads(under(prefix, named(state, layout)) | {prefix + "vit.pooler.dense.weight": torch.ones(2, 2)})
    assert_same(model, state)
    assert "names changed to timm's" in model.recipe.origin["taken"]
    assert loads(named(state, layout), file="model.safetensors").recipe.origin["head"] == "same"


def test_deit_of_transformers_with_its_distillation_token(loads):
    name, sizes = "deit_tiny_distilled_patch16_224", {"num_classes": 3, "img_size": 32, "depth": 1}
    state = vit.create_model(name, seed=2, **sizes).state_dict()
    assert_same(loads(named(state, DEIT), name, **sizes), state)


def test_dinov2_of_transformers(loads):
    name, sizes = "vit_small_patch14_dinov2", {"num_classes": 3, "img_size": 28, "depth": 1}
    state = vit.create_model(name, seed=2, **sizes).state_dict()
    backbone = {key: tensor for key, tensor in state.items() if not key.startswith("head")}
    content = named(backbone, DINO) | {"dinov2.embeddings.mask_token": torch.zeros(1, 384)}
    model = loads(content, name, new_head=True, **sizes)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in backbone.items())
    assert model.recipe.origin["head"] == "random"


@pytest.mark.parametrize(
    "prefix", ["model.", "module.", "backbone.", "net.", "encoder.", "_orig_mod.module.", "model.encoder.backbone."]
)
def test_prefixes_are_found_and_named(prefix, state, loads, capsys):
    model = loads({"state_dict": under(prefix, state) | {"loss.weight": torch.ones(3)}, "epoch": 3})
    assert_same(model, state)
    assert f"prefix '{prefix}' removed; 1 other tensors left out (first: loss.weight)" in capsys.readouterr().out


def test_a_classifier_beside_its_backbone(state, loads):
    body = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    content = under("net.backbone.", body) | {
        "net.classifier." + key: state["head." + key] for key in ("weight", "bias")
    }
    assert_same(loads(content), state)


AVERAGED = {
    "timm": lambda plain, mean: {
        "state_dict": plain,
        "state_dict_ema": mean,
        "args": argparse.Namespace(lr=1),
        "epoch": 9,
    },
    "deit": lambda plain, mean: {"model": plain, "model_ema": mean, "optimizer": {"state": {0: torch.ones(2)}}},
    "dino": lambda plain, mean: {"student": under("module.backbone.", plain), "teacher": under("backbone.", mean)},
    "lightning": lambda plain, mean: {"state_dict": under("model.", plain) | under("ema_model.", mean)},
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_averaged_weights_are_taken_unless_told_not_to(kind, state, loads):
    content = AVERAGED[kind](state, changed(state))
    assert_same(loads(content), changed(state))
    assert_same(loads(content, ema=False), state)


def test_averaged_weights_alone_are_not_taken_for_plain_ones(state, loads):
    with pytest.raises(InputError, match=r"only averaged weights \('model_ema'\)"):
        loads({"model_ema": state}, ema=False)


def test_two_models_in_a_file_are_not_guessed_between(state, loads):
    with pytest.raises(InputError, match=r"holds 2 models \('a', 'b'\)"):
        loads(under("a.", state) | under("b.", changed(state)))


@pytest.mark.parametrize(
    ("key", "chunks"), [("vit.encoder.layer.0.attention.q_proj.weight", 3), ("vit.blocks.0.attn.qkv.weight", 1)]
)
def test_a_tensor_given_twice_is_not_guessed_between(key, chunks, state, loads):
    tensor = state["blocks.0.attn.qkv.weight"].chunk(chunks)[0].clone()
    with pytest.raises(InputError, match=r"holds blocks\.0\.attn\.qkv\.weight twice"):
        loads(named(state, V4) | {key: tensor})


def test_a_fine_tuned_autoencoder_averages_its_tokens(state, loads, tmp_path):
    """MAE's classifier: the mean of the patch tokens, normed by `fc_norm`, instead of the class token."""
    content = {
        key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: value for key, value in state.items()
    }
    model = loads({"model": content})
    assert model.recipe.architecture.global_pool == "avg"
    assert_same(model, content)
    x = torch.randn(2, 3, 8, 8)
    tokens = model.forward_features(x)[:, 1:].mean(1)
    assert torch.allclose(model(x), model.head(model.fc_norm(tokens)))
    assert torch.equal(artifact.load(artifact.save(model, tmp_path / "mae"))(x), model.eval()(x))


def test_an_autoencoders_decoder_is_left_out(state, loads):
    content = state | {"mask_token": torch.zeros(1, 1, 32), "decoder_blocks.0.norm1.weight": torch.ones(4)}
    assert_same(loads({"model": content}), state)


@pytest.mark.parametrize("what", ["none", "seven classes"])
def test_a_head_that_is_not_there(what, state, loads, capsys):
    content = {key: value for key, value in state.items() if what != "none" or not key.startswith("head")}
    if what != "none":
        content |= {"head.weight": torch.ones(7, 32), "head.bias": torch.ones(7)}
    with pytest.raises(InputError, match="no head for 10 classes .*train"):
        loads(content)
    model = loads(content, new_head=True)
    assert model.recipe.origin["head"] == "random"
    assert "new random head for 10 classes" in capsys.readouterr().out
    assert torch.equal(model.state_dict()["norm.weight"], state["norm.weight"])


def test_a_command_takes_a_new_head_only_where_training_follows(state, tmp_path, capsys):
    torch.save(state, tmp_path / "ten.pth")
    common = [
        "compress",
        MICRO,
        "--checkpoint",
        str(tmp_path / "ten.pth"),
        "--classes",
        "7",
        "--out",
        str(tmp_path / "m"),
    ]
    assert main(common) == 2
    assert "no head for 7 classes" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_a_greyscale_model_sees_the_mean_of_the_channels(state, loads, capsys):
    grey = state | {"patch_embed.proj.weight": state["patch_embed.proj.weight"].sum(1, keepdim=True)}
    model, x = loads(grey), torch.randn(2, 3, 8, 8)
    assert "1 channel changed to see the mean of 3" in capsys.readouterr().out
    one = torch.nn.functional.conv2d(
        x.mean(1, keepdim=True), grey["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 2
    )
    assert torch.allclose(model.patch_embed.proj(x), one, atol=1e-5)


def test_positions_are_resampled_for_another_size_and_that_is_said(state, loads, capsys):
    model = loads(state, img_size=12)
    assert model.pos_embed.shape == (1, 37, 32)
    assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0])
    assert "position embedding resampled from 17 to 37 tokens" in capsys.readouterr().out


REFUSED = {
    "int8 values": lambda s: s | {"blocks.0.attn.qkv.weight": s["blocks.0.attn.qkv.weight"].to(torch.int8)},
    "NaN or infinite": lambda s: s | {"norm.bias": s["norm.bias"] * float("nan")},
    "images of 4 channels": lambda s: s | {"patch_embed.proj.weight": torch.ones(32, 4, 2, 2)},
    "2 missing (norm.bias, norm.weight)": lambda s: {k: v for k, v in s.items() if not k.startswith("norm.")},
    "4 unknown (extra.0, extra.1, extra.2, ...)": lambda s: s | {f"extra.{i}": torch.ones(1) for i in range(4)},
    "pos_embed is (1, 13, 32)": lambda s: s | {"pos_embed": torch.ones(1, 13, 32)},
    "no dense tensor": lambda s: s | {"norm.bias": torch.ones(32).to_sparse()},
    "holds no Vision Transformer": lambda s: {"conv1.weight": torch.ones(3), "fc.bias": torch.ones(2)},
    "(list)": lambda s: list(s.values()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(message, state, loads):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        loads(REFUSED[message](state))
    assert len(str(caught.value).splitlines()) == 1
    assert "weights.pth" in str(caught.value)


def test_a_pickled_module_is_not_executed(loads):
    with pytest.raises(InputError, match="Python objects .*save model.state_dict"):
        loads(vit.create_model(MICRO))


def mutated(state, rng):
    """The state with one thing wrong with it, or moved, and whether it is still the same model."""
    keys = sorted(state)
    key = keys[int(torch.randint(len(keys), (1,), generator=rng))]
    tensor, other = state[key], {k: v for k, v in state.items() if k != key}
    values = {
        "as it is": (state, True),
        "half": ({k: v.double() for k, v in state.items()}, True),
        "nested": ({"epoch": 1, "weights": {"net": under("a.b.", state)}}, True),
        "more beside": ({"state_dict": under("net.", state) | {"loss": tensor}}, True),
        "gone": (other, False),
        "misspelled": (other | {key + "x": tensor}, False),
        "longer": (other | {key: torch.cat([tensor, tensor])}, False),
        "flat": (other | {key: tensor.flatten()[:1]}, False),
        "scalar": (other | {key: torch.tensor(1.0)}, False),
        "empty": (other | {key: tensor[:0]}, False),
        "integer": (other | {key: tensor.to(torch.int32)}, False),
        "complex": (other | {key: tensor.to(torch.complex64)}, False),
        "nan": (other | {key: tensor * float("nan")}, False),
        "infinite": (other | {key: tensor + float("inf")}, False),
        "a number": (other | {key: 3.0}, False),
        "a list": (other | {key: tensor.tolist()}, False),
        "prefixed alone": (other | {"model." + key: tensor}, False),
        "key is a number": (other | {7: tensor}, False),
    }
    names = sorted(values)
    name = names[int(torch.randint(len(names), (1,), generator=rng))]
    return f"{name}: {key}", *values[name]


@pytest.mark.slow
def test_mutated_states_load_right_or_are_refused_in_one_line(state, loads):
    rng = torch.Generator().manual_seed(0)
    for _ in range(70):
        what, content, same = mutated(state, rng)
        if same:
            assert_same(loads(content), state)
            continue
        with pytest.raises(InputError) as caught:
            pytest.fail(f"{what} was loaded: {loads(content).recipe.origin}")
        assert len(str(caught.value).splitlines()) == 1, what
        assert "weights.pth" in str(caught.value), what
