"""Steps: the best fixed ones, and those that are learned."""

import pytest
import torch

from vitbench.calibration.quantizers import LearnedStep, code_range, learnable_fake_quantize, min_error_step


def error(x, step, bits):
    low, high = code_range(bits)
    return ((x / step).round().clamp(low, high) * step - x).square().sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_best_step_beats_the_range_and_its_neighbours(bits, dim):
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    step = min_error_step(x, bits, dim)
    widest = x.abs().amax(dim=dim, keepdim=True) / code_range(bits)[1]
    assert step.shape == widest.shape
    assert error(x, step, bits) <= error(x, widest, bits)
    assert error(x, step, bits) < min(error(x, 0.8 * step, bits), error(x, 1.25 * step, bits))


def test_a_row_of_zeros_is_kept():
    x = torch.zeros(2, 5)
    assert torch.equal((x / min_error_step(x, 4, 1)).round(), x)


def test_gradients_are_those_of_lsq():
    x = torch.tensor([[0.3, -2.0, 5.0, -5.0]], requires_grad=True)
    quantizer = LearnedStep(1, 3, dim=1)  # codes -4 .. 3
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]  # 5 and -5 are outside [-4, 3]
    inside = (round(0.3) - 0.3) + (-2.0 + 2.0)
    assert quantizer.step.grad.item() == pytest.approx((inside + 3 - 4) / (4 * 3) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("steps", [(6, 1), (1, 9), (1,)])
@pytest.mark.parametrize("zero_point", [True, False])
def test_learnable_fake_quantize_has_the_gradients_of_its_single_operations(steps, zero_point):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(4, 6, 9, generator=generator) for _ in range(2))
    step = 0.1 + 0.3 * torch.rand(steps, generator=generator)
    zero = torch.randint(0, 3, steps, generator=generator).float() if zero_point else None
    inputs = [tensor.requires_grad_() for tensor in (x, step, zero) if tensor is not None]

    def single_operations():
        shift = 0 if zero is None else zero
        v = (x / step + shift).clamp(-4, 3)
        return (v + (v.round() - v).detach() - shift) * step

    results = [single_operations(), learnable_fake_quantize(x, step, zero, -4, 3)]
    torch.testing.assert_close(*results)
    for one, other in zip(*(torch.autograd.grad(result, inputs, grad) for result in results), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["mse", "lsq"])
def test_exported_codes_are_what_the_forward_pass_uses(rule):
    x = 0.3 + torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    quantizer = LearnedStep(6, 4, dim=0, zero_point=True)
    quantizer.init_from(x, rule)
    quantizer.zero.data += torch.linspace(-3, 3, 6)
    codes, step, zero = quantizer.codes_and_steps(x)
    assert (int(codes.min()), int(codes.max())) >= (-8, -8)
    assert int(codes.max()) <= 7
    assert torch.allclose((codes - zero) * step, quantizer(x), atol=1e-5)


def test_training_the_step_lowers_the_error():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    quantizer = LearnedStep(8, 3, dim=0)
    quantizer.step.data.fill_(2.0)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    before = float((quantizer(x) - x).square().mean().detach())
    for _ in range(200):
        optimizer.zero_grad()
        loss = (quantizer(x) - x).square().mean()
        loss.backward()
        optimizer.step()
    loss = float(loss.detach())
    assert loss < 0.3 * before
    assert loss < 1.1 * float(error(x, min_error_step(x, 3, 0), 3) / x.numel())
