"""Codes that are fitted block by block."""

import copy

import pytest
import torch

from vitbench import artifact, vit
from vitbench.batches import eval_batches
from vitbench.coded import RowCoder
from vitbench.errors import InputError
from vitbench.methods import compress, make_config
from vitbench.reconstruction import reconstruct


def test_each_block_answers_more_like_the_given_one(base, digits):
    x = torch.cat([batch for batch, _ in eval_batches(digits.calibration, base.model.recipe.preprocess)])
    lost = {}
    for steps in (0, 40):
        model = copy.deepcopy(base.model)
        coders = {name: RowCoder(name, layer, 2) for name, layer in vit.linears(model).items()}
        reconstruct(model, base.model, coders, digits.calibration, steps)
        with torch.no_grad():
            lost[steps] = float((model(x) - base.model(x)).square().mean())
            for name, layer in vit.linears(model).items():
                assert torch.equal(layer.weight, coders[name].decode()[name])
    assert lost[40] < 0.5 * lost[0]


def test_it_is_part_of_weight_only_and_goes_through_the_file(base, digits, tmp_path):
    x, config = torch.randn(20, 3, 8, 8), {"bits": 2, "group": 32, "rounding": "second_order", "rest": "float32"}
    small = compress(base.model, make_config("weight_only", {**config, "reconstruction": 30}), digits)
    loaded = artifact.load(artifact.save(small, tmp_path / "small"))
    assert torch.allclose(loaded(x), small(x), atol=1e-5)
    plain = compress(base.model, make_config("weight_only", config), digits)
    sizes = [artifact.size_on_disk(artifact.save(each, tmp_path / str(i))) for i, each in enumerate((small, plain))]
    assert abs(sizes[0] - sizes[1]) < 100, "the same bytes"


def test_it_needs_images(base):
    with pytest.raises(InputError, match="reconstruction needs calibration images and no data set was given"):
        compress(base.model, make_config("weight_only", {"reconstruction": 5}))
