"""The folded answers of the lessons' exercises: what can be computed in them is computed here."""

import copy
import math
import re

import numpy as np
import pytest
import torch

from tests.project.test_notebooks import NOTEBOOKS
from vitbench.base.errors import InputError
from vitbench.methods.registry import compress, make_config
from vitbench.model.layers.factored import reordered_share
from vitbench.model.vit import LINEAR_TYPES, linear_layers
from vitbench.removal.dependence import centre_kernel, gaussian_mixture, hsic
from vitbench.rows import statistics


def answers(lesson):
    """The folded answers of a lesson, blanks and line ends as single blanks."""
    import nbformat

    path = next(path for path in NOTEBOOKS if path.stem.startswith(f"{lesson}_"))
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    return [" ".join(found.split()) for found in re.findall(r"</summary>(.*?)</details>", text, re.S)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_lesson_has_three_to_five(path):
    assert 3 <= len(answers(path.stem.split("_")[0])) <= 5


def test_00_where_intervals_part():
    text = answers("00")[0]
    low, high = statistics.wilson(558, 600)
    assert f"{100 * low:.1f} to {100 * high:.1f} %" in text
    below = next(n for n in range(558, 0, -1) if statistics.wilson(n, 600)[1] < low)
    assert f"{558 - below} fewer right answers, {below} of 600" in text


def test_01_tokens_of_smaller_patches():
    text = answers("01")[0]
    coarse, fine = ((224 // patch) ** 2 + 1 for patch in (16, 8))
    assert (coarse, fine) == (197, 785)
    assert "197" in text
    assert "785" in text
    assert (fine / coarse) ** 2 == pytest.approx(16, abs=0.2)


def test_02_share_of_the_mlp_and_logarithmic_codes(base):
    first, _, third = answers("02")
    mlp, every = (
        sum(layer.weight.numel() for layer in linear_layers(base.model, kinds).values())
        for kinds in (("fc1", "fc2"), LINEAR_TYPES)
    )
    assert mlp / every == pytest.approx(2 / 3)
    assert "two thirds" in first
    for base_, high, low in ((2, 41, 29), (math.sqrt(2), 19, 16)):
        assert round(100 * (base_**0.5 - 1)) == high
        assert round(100 * (1 - base_**-0.5)) == low
        assert str(high) in third
        assert str(low) in third
    assert f"2^{{{-15 / 2:g}}}" in third


def test_03_bits_of_groups_and_codes():
    first, second, _ = answers("03")
    assert f"= {4 + 16 / 32:g}$ bits" in first
    assert f"g = {16 / 1.5:.1f}" in first
    assert f"one code in {2**8}" in second
    assert "one in four" in second


def test_04_scale_of_queries_and_size_of_zeros(base, digits, tmp_path):
    assert r"\sqrt{1/2}" in answers("04")[0]
    q, k, v = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))  # half of heads of width 32
    wanted = torch.softmax(q @ k.T / math.sqrt(32), -1) @ v
    found = torch.nn.functional.scaled_dot_product_attention(math.sqrt(1 / 2) * q[None], k[None], v[None])[0]
    assert torch.allclose(found, wanted, atol=1e-5)
    from vitbench.model import artifact

    fewer = compress(base.model, make_config("pruning", {"neurons": 0.0, "heads": 0.0, "tokens": 0.2}), digits).model
    masked = copy.deepcopy(base.model)
    masked.blocks[0].mlp.fc1.weight.data[:64] = 0
    files = [artifact.save(model, tmp_path / str(i)) for i, model in enumerate((base.model, masked, fewer))]
    assert len({(file / "model.safetensors").stat().st_size for file in files}) == 1


def test_05_rank_and_correction(base, digits):
    assert f"{768 * 192 / (768 + 192):g}" in answers("05")[0]
    own = make_config("mixed_rank", {"keep": 0.4, "propagate": False})
    bare = own.replace(compensation="none")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    models = [compress(base.model, config, digits).model for config in (own, bare)]
    with torch.inference_mode():
        found = [model(x) for model in models]
    assert torch.allclose(*found, atol=1e-4), "own inputs alone leave nothing to make up for"


def test_06_warm_distributions_are_matched_logits():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    teacher, student = teacher - teacher.mean(), student - student.mean()
    T = 1000.0
    p, q = torch.softmax(teacher / T, 0), torch.softmax(student / T, 0)
    assert float(T**2 * (p * (p / q).log()).sum()) == pytest.approx(
        float((teacher - student).square().sum() / 20), rel=0.01
    )
    assert r"\frac{1}{2 C T^2}" in answers("06")[0]


def test_07_break_even_and_a_shared_factor():
    first, second, third, _ = answers("07")
    assert f"r = {3 / (1 + 3):g}\\,d" in first
    assert f"gives ${4 / (1 + 4):g}\\,d$" in first
    assert reordered_share(100, 75) == pytest.approx(1)
    ratio, depth = 0.72, 12
    own, shared = ratio * (1 + 1 + 1 + 4), ratio * (3 + 1 + 4 + 1)  # Z of a block, D of them all, in units of d^2
    assert 12 / own == pytest.approx(2.4, abs=0.05)
    assert 12 * depth / (depth * own + shared) == pytest.approx(2.1, abs=0.06)
    assert "$12 / 5 \\approx 2.4$ times; for 12 blocks, with $D$, about 2.1" in second
    n = ratio / (2 * ratio - 1)  # n r 2d = r d^2 + n d^2, in units of d
    assert f"$n > {n:.2f}\\,d$" in third


def test_08_hsic_of_independent_samples_falls():
    generator = torch.Generator().manual_seed(0)

    def mean(n, times=60):
        draws = [
            [centre_kernel(gaussian_mixture(torch.randn(n, 1, generator=generator))) for _ in range(2)]
            for _ in range(times)
        ]
        return float(np.mean([hsic(*pair) for pair in draws]))

    few, many = mean(25), mean(100)
    assert few > many > 0
    assert few / many == pytest.approx(4, rel=0.35), "as 1 / n"


def test_09_where_landmarks_pay():
    text = answers("09")[0]

    def least(turns, m=64, c=64):
        return next(n for n in range(1, 2000) if 4 * n * m * c + 2 * m**2 * c + 4 * turns * m**3 < 2 * n**2 * c)

    assert f"$N > {least(6) - 1}$" in text
    assert f"it is {least(2)}" in text or f"it is {least(2) - 1}" in text


def test_10_energy_of_a_byte():
    text = answers("10")[2]
    energy = 1470 * 0.1
    assert f"{energy:g} J for 346 MB" in text
    assert f"{energy / 346:.2f} µJ a byte" in text


def test_11_savings_and_their_product():
    text = answers("11")[0]
    both = 9 / 2 * 4 / 32 + 1
    pruned, coded = 9 / 2 + 1, 9 * 4 / 32 + 1
    for number in (
        f"{both:.2f} MB",
        f"{pruned:g}",
        f"{coded:g}",
        f"{pruned / 10:g}",
        f"{coded / 10:g}",
        f"{pruned * coded / 100:.3f}",
    ):
        assert number in text


def test_12_the_luckiest_of_many(base, digits):
    first, _, third = answers("12")
    best = np.random.default_rng(0).binomial(200, 0.9, (4000, 32)).max(axis=1).mean() / 200
    assert 100 * (best - 0.9) == pytest.approx(4, abs=0.5)
    assert "about 4 points" in first
    from vitbench.run.combinations import fit_budget

    assert "weight_only" in third
    with pytest.raises(InputError):
        fit_budget(base.model, "weight_only", digits, cost="macs", target=0.5)
