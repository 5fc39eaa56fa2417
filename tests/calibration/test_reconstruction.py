"""Codes that are fitted block by block."""

import copy

import pytest
import torch

from vitbench.base.errors import InputError
from vitbench.calibration import reconstruction
from vitbench.calibration.coders import RowCoder
from vitbench.calibration.reconstruction import reconstruct
from vitbench.data.batches import eval_batches
from vitbench.data.splits import load_data
from vitbench.methods.registry import compress, make_config
from vitbench.model import artifact, vit


@pytest.mark.slow
def test_each_block_answers_more_like_the_given_one(base, digits):
    x = torch.cat([batch for batch, _ in eval_batches(digits.calibration, base.model.recipe.preprocess)])
    lost = {}
    for steps in (0, 40):
        model = copy.deepcopy(base.model)
        coders = {name: RowCoder(name, layer, 2) for name, layer in vit.linear_layers(model).items()}
        reconstruct(model, base.model, coders, digits.calibration, steps)
        with torch.no_grad():
            lost[steps] = float((model(x) - base.model(x)).square().mean())
            for name, layer in vit.linear_layers(model).items():
                assert torch.equal(layer.weight, coders[name].decode()[name])
    assert lost[40] < 0.5 * lost[0]


@pytest.mark.slow
def test_it_is_part_of_weight_only_and_goes_through_the_file(base, digits, tmp_path):
    x, config = torch.randn(20, 3, 8, 8), {"bits": 2, "group": 32, "rounding": "second_order", "rest": "float32"}
    small = compress(base.model, make_config("weight_only", {**config, "reconstruction": 30}), digits).model
    loaded = artifact.load(artifact.save(small, tmp_path / "small"))
    assert torch.allclose(loaded(x), small(x), atol=1e-5)
    plain = compress(base.model, make_config("weight_only", config), digits).model
    sizes = [artifact.size_on_disk(artifact.save(each, tmp_path / str(i))) for i, each in enumerate((small, plain))]
    assert abs(sizes[0] - sizes[1]) < 100, "the same bytes"


@pytest.mark.parametrize("harm", ["killed", "one bit"])
def test_a_killed_reconstruction_goes_on_after_the_last_whole_block(tmp_path, monkeypatch, capsys, harm):
    few = load_data("digits", train=64, test=32, val=32, calibration=32)
    model = vit.create_model("vit_micro_patch2_8", num_classes=10, seed=0)
    config = make_config("weight_only", {"bits": 2, "reconstruction": 3})
    monkeypatch.setenv("VITBENCH_HOME", str(tmp_path))
    whole = compress(model, config, few).model
    folder = tmp_path / "results" / "cache" / "reconstructions"
    assert not list(folder.glob("*")), "nothing is left of one that ended well"
    fit, fitted = reconstruction._fit, []

    def dying(*given):
        fitted.append(1)
        if len(fitted) == 3:
            raise KeyboardInterrupt
        fit(*given)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruction, "_fit", dying)
        with pytest.raises(KeyboardInterrupt):
            compress(model, config, few)
    first, second = sorted(folder.glob("*"))
    if harm == "one bit":
        content = bytearray(second.read_bytes())
        content[-40] ^= 1
        second.write_bytes(content)
    fitted.clear()
    monkeypatch.setattr(reconstruction, "_fit", lambda *given: fitted.append(1) or fit(*given))
    again = compress(model, config, few).model
    assert len(fitted) == len(model.blocks) - (2 if harm == "killed" else 1)
    assert (f"{second.name}' is damaged" in capsys.readouterr().out) == (harm == "one bit")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())


def test_it_needs_images(base):
    with pytest.raises(InputError, match="reconstruction needs calibration images and no data set was given"):
        compress(base.model, make_config("weight_only", {"reconstruction": 5}))
