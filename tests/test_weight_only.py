"""Weight-only codes: what a factorisation has to beat."""

import pytest
import torch

from vitbench import artifact, vit
from vitbench.layers import PackedLinear
from vitbench.methods import compress, make_config
from vitbench.training import evaluate


def test_fewer_bits_smaller_files_larger_errors(base, digits, tmp_path):
    x, sizes, errors = torch.randn(16, 3, 8, 8), [], []
    for bits in (2, 3, 4, 8):
        small = compress(base.model, make_config("weight_only", {"bits": bits}))
        sizes.append(artifact.size_on_disk(artifact.save(small, tmp_path / str(bits))))
        errors.append(float((small(x) - base.model(x)).square().mean()))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    weights = sum(layer.weight.numel() for layer in vit.linears(base.model).values())
    assert sizes[1] - sizes[0] == pytest.approx(weights / 8, rel=0.02)


def test_the_weights_are_whole_steps(base):
    small = compress(base.model, make_config("weight_only", {"bits": 3, "rest": "float32"}))
    layer = small.blocks[1].mlp.fc1
    assert isinstance(layer, PackedLinear)
    codes = layer.dense() / layer.step[:, None]
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert (int(codes.min()), int(codes.max())) == (-4, 3)


def test_trained_two_bit_weights_beat_rounded_ones(base, digits):
    rounded = compress(base.model, make_config("weight_only", {"bits": 2}))
    trained = compress(base.model, make_config("weight_only", {"bits": 2, "train": {"epochs": 2}}), digits)
    assert evaluate(trained, digits.val).top1.mean() > evaluate(rounded, digits.val).top1.mean()
