"""Models: what timm's Vision Transformers are made of, and which weights fit."""

import pytest
import torch
from safetensors.torch import save_file

from vitbench.base.errors import InputError
from vitbench.measurement.cost import count_macs
from vitbench.model import vit


@pytest.mark.parametrize("name", ["vit_mini_patch2_8", "vit_mini_patch4_32", "deit_tiny_patch16_224"])
def test_counted_macs_are_those_of_the_formula(name):
    model = vit.create_model(name)
    assert count_macs(model) == pytest.approx(vit.analytic_macs(model), rel=1e-3)


def test_macs_of_deit_small_by_hand():
    model = vit.meta_model(vit.Architecture(name="deit_small_patch16_224", num_classes=1000, img_size=224))
    blocks = 12 * (12 * 197 * 384**2 + 2 * 197**2 * 384)
    assert vit.analytic_macs(model) == blocks + 196 * 16 * 16 * 3 * 384 + 384 * 1000


def test_preprocessing_is_timms():
    preprocess = vit.create_model("deit_tiny_patch16_224").recipe.preprocess
    assert (preprocess.size, preprocess.interpolation, preprocess.crop_pct) == (224, "bicubic", 0.9)


def test_linears_of_the_blocks_by_type():
    model = vit.create_model("vit_mini_patch2_8")
    assert len(vit.linear_layers(model)) == 16
    assert set(vit.linear_layers(model, ("proj",))) == {f"blocks.{i}.attn.proj" for i in range(4)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_mini_patch2"}, "did you mean 'vit_mini_patch2_8'"),
        ({"name": "hf-hub:someone/model"}, "unknown model"),
        ({"name": "resnet18"}, "not a VisionTransformer|not a Vision Transformer"),
        ({"name": "vit_mini_patch2_8", "pretrained": True}, "no pretrained weights"),
        ({"name": "vit_mini_patch2_8", "checkpoint": "nowhere.safetensors"}, "does not exist"),
    ],
)
def test_models_that_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        vit.create_model(**arguments)


def test_checkpoints_in_both_formats(tmp_path):
    start = vit.create_model("vit_mini_patch2_8", seed=1)
    state = {key: value.contiguous() for key, value in start.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"model": state}, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        model = vit.create_model("vit_mini_patch2_8", checkpoint=tmp_path / name)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        assert model.recipe.origin["start"].startswith(name)
    five = {"num_classes": 5, "checkpoint": tmp_path / "a.pth"}
    with pytest.raises(InputError, match="no head for 5 classes"):
        vit.create_model("vit_mini_patch2_8", **five)
    other_head = vit.create_model("vit_mini_patch2_8", new_head=True, **five)
    assert other_head.recipe.origin["head"] == "random"
    assert torch.equal(other_head.blocks[0].attn.qkv.weight, start.blocks[0].attn.qkv.weight)


def test_checkpoints_that_do_not_fit(tmp_path):
    start = vit.create_model("vit_mini_patch2_8")
    save_file({key: value.contiguous() for key, value in start.state_dict().items()}, tmp_path / "mini.safetensors")
    with pytest.raises(InputError, match="of another architecture"):
        vit.create_model("vit_mini_patch4_32", checkpoint=tmp_path / "mini.safetensors")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match="not a safetensors or plain state-dict"):
        vit.create_model("vit_mini_patch2_8", checkpoint=tmp_path / "text.pth")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    import pickle

    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"model": Harm()}))
    with pytest.raises(InputError, match="not a safetensors or plain state-dict"):
        vit.create_model("vit_mini_patch2_8", checkpoint=tmp_path / "bad.pth")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "deit_tiny_patch16_224", "img_size": 8}, "smaller than a patch .*16 pixels"),
        ({"name": "deit_tiny_patch16_224", "img_size": 100}, "not cover the last 4 rows and columns; give 96 or 112"),
        ({"name": "t2t_vit_t_14", "img_size": 50}, "not cover the last 1 rows"),
        ({"name": "vit_tiny_r_s16_p8_224", "img_size": 40}, "img_size=40|last 8 rows"),
        ({"name": "vit_mini_patch2_8", "img_size": (8, 4)}, r"img_size = \(8, 4\): give a whole number .*square"),
        ({"name": "vit_mini_patch2_8", "num_classes": 0}, "num_classes = 0: give a whole number"),
        ({"name": "vit_mini_patch2_8", "num_classes": True}, "num_classes = True: give a whole number"),
        ({"name": "vit_small_patch14_dinov2", "img_size": 28}, "no default number of classes; give one"),
    ],
)
def test_sizes_that_are_refused(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        vit.create_model(**{"depth": 1, **arguments})
    assert len(str(caught.value).splitlines()) == 1
