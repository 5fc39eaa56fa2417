"""Saved models: what is loaded is what was saved, and damage is noticed."""

import json

import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, vit


@pytest.fixture
def small(base):
    return compress(base.model, make_config("dynamic_int8")).model


def test_round_trip_and_identical_bytes(small, tmp_path):
    x = torch.randn(3, 3, 8, 8)
    paths = [artifact.save(small, tmp_path / name) for name in "ab"]
    loaded = artifact.load(paths[0])
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in small.state_dict().items())
    assert torch.allclose(loaded(x), small(x), atol=0.1)  # a sum that differs in its last bit may get another code
    assert loaded.recipe.method == "dynamic_int8"
    for name in ("model.safetensors", "recipe.json"):
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes()
    third = artifact.save(loaded, tmp_path / "c")
    assert (third / "model.safetensors").read_bytes() == (paths[0] / "model.safetensors").read_bytes()


def test_bytes_are_those_of_the_files(small, tmp_path):
    path = artifact.save(small, tmp_path / "a")
    assert artifact.size_on_disk(path) == sum(file.stat().st_size for file in path.iterdir())
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "recipe.json"]


def test_saving_again_replaces_the_whole_folder(small, base, tmp_path):
    artifact.save(small, tmp_path / "a")
    artifact.save(base.model, tmp_path / "a")
    assert artifact.load(tmp_path / "a").recipe.method == "baseline"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_flipped_bit_is_noticed(small, tmp_path):
    path = artifact.save(small, tmp_path / "a")
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (path / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="damaged"):
        artifact.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda recipe: recipe["architecture"].update(name="hf-hub:someone/model"), "unknown model"),
        (lambda recipe: recipe["architecture"].update(name="vit_mini_patch4_32"), "do not fit"),
        (
            lambda recipe: recipe["layers"].update({"blocks.0.attn.qkv": {"layer": "os.system"}}),
            "unknown runtime layer",
        ),
        (
            lambda recipe: recipe["layers"].update({"nothing.here": {"layer": "DynamicInt8Linear"}}),
            "unknown layer in the recipe",
        ),
        (lambda recipe: recipe["layers"]["blocks.0.attn.qkv"].update(colour=1), "does not fit DynamicInt8Linear"),
        (lambda recipe: recipe.update(surprise=1), "unknown key"),
    ],
)
def test_recipes_that_are_refused(small, tmp_path, change, message):
    path = artifact.save(small, tmp_path / "a")
    manifest = json.loads((path / "recipe.json").read_text())
    change(manifest["recipe"])
    del manifest["check"]  # whoever changes a recipe on purpose can change that too
    (path / "recipe.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        artifact.load(path)


def test_not_a_model(tmp_path, base):
    with pytest.raises(InputError, match="not a saved model"):
        artifact.load(tmp_path)
    artifact.save(base.model, tmp_path / "a")
    (tmp_path / "a" / "recipe.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        artifact.load(tmp_path / "a")


def test_a_model_without_a_recipe_cannot_be_saved(tmp_path):
    import timm

    with pytest.raises(InputError, match="no recipe"):
        artifact.save(timm.create_model("vit_tiny_patch16_224"), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_model(small, base, tmp_path, monkeypatch):
    artifact.save(base.model, tmp_path / "a")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "write_tensors", full)
    with pytest.raises(InputError, match="No space left"):
        artifact.save(small, tmp_path / "a")
    assert artifact.load(tmp_path / "a").recipe.method == "baseline"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_the_skeleton_takes_no_memory():
    model = vit.meta_model(vit.Architecture(name="vit_large_patch16_224", num_classes=10, img_size=224))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
