"""Coded tensors come back bit for bit, and damaged or swollen ones are refused."""

import json
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitbench.base.errors import InputError
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact
from vitbench.model.deflate import deflate, inflate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.int8, torch.int16])
@pytest.mark.parametrize("shape", [(7, 5), (1,), (), (0, 3)])
def test_what_is_coded_comes_back(dtype, shape):
    tensor = (10 * torch.randn(shape)).to(dtype)
    for level in (1, 9):
        assert torch.equal(inflate(deflate(tensor, level), tensor.shape, dtype), tensor)


def test_a_coded_file_is_the_same_model_and_smaller(base, digits, tmp_path):
    plain = compress(base.model, make_config("weight_only", {"bits": 4})).model
    coded = compress(plain, make_config("deflate")).model
    one, other = (artifact.save(model, tmp_path / name) for model, name in ((plain, "plain"), (coded, "coded")))
    assert artifact.size_on_disk(other) < artifact.size_on_disk(one)
    first, second = artifact.load(one).state_dict(), artifact.load(other).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert "deflate" not in json.loads((one / "recipe.json").read_text())["recipe"]
    again = artifact.save(artifact.load(other), tmp_path / "again")
    assert artifact.size_on_disk(again) == artifact.size_on_disk(other)
    with pytest.raises(InputError, match="deflate after weight_only.deflate changes nothing"):
        compress(coded, make_config("deflate"))


def rewritten(path, change):
    """The saved model with one tensor of its file changed, and checksums that fit."""
    tensors = load_file(path / "model.safetensors")
    key = next(key for key in tensors if key.endswith("fc1.codes"))
    tensors[key] = change(tensors[key])
    save_file(tensors, path / "model.safetensors")
    content = json.loads((path / "recipe.json").read_text())
    content["sha256"], _ = artifact._sha256(path / "model.safetensors"), content.pop("check")
    (path / "recipe.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda coded: coded[: len(coded) // 2], "bytes or more, and .* are expected"),
        (lambda coded: torch.zeros_like(coded), "a coded tensor is damaged"),
        (lambda coded: coded.float(), "coded tensors are uint8, and one is torch.float32"),
        (
            lambda coded: torch.frombuffer(bytearray(zlib.compress(bytes(10**8))), dtype=torch.uint8),
            r"has \d+ bytes or more, and \d+ are expected",
        ),
    ],
)
def test_a_damaged_or_swollen_tensor_is_refused(base, tmp_path, change, message):
    configs = [make_config("weight_only", {"bits": 4}), make_config("deflate")]
    path = artifact.save(compress(base.model, configs).model, tmp_path / "coded")
    with pytest.raises(InputError, match=message):
        artifact.load(rewritten(path, change))


def test_a_small_file_cannot_claim_a_large_model(base, tmp_path):
    model = compress(base.model, make_config("deflate")).model
    for parameter in model.parameters():
        parameter.zero_()
    path = artifact.save(model, tmp_path / "zeros")
    content = json.loads((path / "recipe.json").read_text())
    content.pop("check")
    content["recipe"]["architecture"]["depth"] = 500
    (path / "recipe.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="the recipe claims [0-9,]+ bytes of tensors, and the file holds"):
        artifact.load(path)
