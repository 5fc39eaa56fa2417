"""Weight-only codes: what a factorisation has to beat."""

import pytest
import torch

from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, vit
from vitbench.model.layers import PackedLinear
from vitbench.training.loop import evaluate


def test_fewer_bits_smaller_files_larger_errors(base, digits, tmp_path):
    x, sizes, errors = torch.randn(16, 3, 8, 8), [], []
    for bits in (2, 3, 4, 8):
        small = compress(base.model, make_config("weight_only", {"bits": bits})).model
        sizes.append(artifact.size_on_disk(artifact.save(small, tmp_path / str(bits))))
        errors.append(float((small(x) - base.model(x)).square().mean()))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    weights = sum(layer.weight.numel() for layer in vit.linear_layers(base.model).values())
    assert sizes[1] - sizes[0] == pytest.approx(weights / 8, rel=0.02)


def test_the_weights_are_whole_steps(base):
    small = compress(base.model, make_config("weight_only", {"bits": 3, "rest": "float32"})).model
    layer = small.blocks[1].mlp.fc1
    assert isinstance(layer, PackedLinear)
    codes = layer.dense() / layer.step[:, None]
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert (int(codes.min()), int(codes.max())) == (-4, 3)


@pytest.mark.slow
def test_trained_two_bit_weights_beat_rounded_ones(base, digits):
    rounded = compress(base.model, make_config("weight_only", {"bits": 2})).model
    trained = compress(base.model, make_config("weight_only", {"bits": 2, "train": {"epochs": 2}}), digits).model
    assert evaluate(trained, digits.val).top1.mean() > evaluate(rounded, digits.val).top1.mean()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("group", [None, 64])
def test_the_file_is_as_large_as_its_bits_say(bits, group, tmp_path):
    """bits x weights + 16 bits for each step and for all that has no codes: within 2 %, headers and recipe included."""
    model = vit.create_model("deit_tiny_patch16_224", depth=6)
    path = artifact.save(
        compress(model, make_config("weight_only", {"bits": bits, "group": group})).model, tmp_path / "small"
    )
    coded = {f"{name}.weight": layer.weight for name, layer in vit.linear_layers(model).items()}
    ends = {f"{name}.weight": layer.weight for name, layer in vit.embedding_and_heads(model).items()}
    steps = sum(weight.numel() // group if group else len(weight) for weight in coded.values())
    steps += sum(len(weight) for weight in ends.values())
    rest = sum(tensor.numel() for key, tensor in model.state_dict().items() if key not in coded and key not in ends)
    expected = (
        bits * sum(map(torch.Tensor.numel, coded.values())) + 8 * sum(map(torch.Tensor.numel, ends.values()))
    ) / 8
    assert artifact.size_on_disk(path) == pytest.approx(expected + 2 * (steps + rest), rel=0.02)
    x = torch.randn(1, 3, 224, 224)
    small = compress(model, make_config("weight_only", {"bits": bits, "group": group, "rest": "float32"})).model
    loaded = artifact.load(artifact.save(small, tmp_path / "whole"))
    assert torch.allclose(loaded(x), small(x), atol=1e-4)
