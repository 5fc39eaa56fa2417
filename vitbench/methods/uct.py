"""UCT: weights as low-bit codes times a low-bit factor that all blocks share, trained end to end.

DeepCompress-ViT (CVPR 2025, pp. 30147-30156), "Unified Compression Training". For each type of linear layer the weights
of all L blocks stand one below the other, M = [W_1^T; ...; W_L^T] (L in x out), and

    M ~ Z D,    Z (L in x r) and D (r x out) in 4-bit codes,

with a step and a zero point for each column of Z and a step for each column of D. Training minimises

    lambda ||Z D - M||^2 / (L in out) + (1 - k) CE + k KL(teacher || student)

over Z, D, the steps, and all else in the ViT. In the paper Z is made by an encoder from M ("encoder"); since M is a
constant and the encoder is linear in it, Z can as well be the parameter itself ("direct"), started from the closed form.
"""

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from vitbench.base import progress
from vitbench.base.errors import InputError
from vitbench.calibration.coders import embedding_and_head_coders
from vitbench.calibration.factors import (
    DirectFactor,
    Encoder,
    FactorCoder,
    closed_form_factors,
    output_grams,
    stack_weights,
)
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import vit
from vitbench.model.layers.factored import Order, factored_layers
from vitbench.model.vit import LINEAR_TYPES, dense_layers_by_type
from vitbench.training.coded import CodedModel, CodedTrainingConfig, train_codes
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import find_teacher

HIDDEN = {"qkv": 2, "proj": 1, "fc1": 2, "fc2": 1}  # the encoder's hidden width in widths of the ViT, by type


class UCT(CodedTrainingConfig):
    """Settings of UCT.

    Attributes:
        layers: which types of linear layers to code.
        rank: r, one for all types; None takes `rank_ratio` of the ViT's width.
        rank_ratio: 0.72 is the paper's for DeiT-S (277 of 384); re-ordered inference needs fewer MACs below 0.75.
        bits: of the codes of Z and of D.
        form: "direct" trains Z itself; "encoder" is the paper's.
        start: what the direct form's closed-form start minimises: the error of the layers' outputs on calibration
            images ("activations"), each block weighing the same, or that of the weights.
        mse_weight: lambda.
        order: how the compressed layers multiply, see `FactoredLinear`.
        warm_steps: steps on the weights' error alone before the encoder form's joint training (Adam, 1e-3 to 1e-6).
        steps_rule, steps_first: how the quantizers start, and whether they do so before the warm start; ours is the
            least rounding error, after the first half of it.
        head_bits: bits of the head where they are not `ends_bits`.
    """

    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = LINEAR_TYPES
    rank: int | None = Field(default=None, ge=1)
    rank_ratio: float = Field(default=0.72, gt=0, le=1)
    bits: int = Field(default=4, ge=2, le=8)
    form: Literal["direct", "encoder"] = "direct"
    start: Literal["activations", "weights"] = "activations"
    mse_weight: float = Field(default=0.25, ge=0)
    order: Order = "reordered"
    warm_steps: int = Field(default=1000, ge=0)
    steps_rule: Literal["mse", "lsq"] = "mse"
    steps_first: bool = False
    head_bits: int | None = Field(default=None, ge=2, le=8)
    train: TrainConfig = TrainConfig(epochs=15, lr=2e-3, warmup_epochs=0, kd_weight=0.75, mixup=0.0)


# The official code's choices: its encoder, its quantizers' start on the untrained encoder, a head that really has 4 bits
# where 8 were meant, one learning rate, weights 1 : 1 : 3 of the three losses, no clipping. The last epoch is kept, where
# the official code keeps the best one on its test images.
OFFICIAL_UCT = UCT(
    form="encoder",
    steps_rule="lsq",
    steps_first=True,
    head_bits=4,
    rest_lr=1.0,
    train=TrainConfig(
        epochs=275,
        batch_size=256,
        lr=1e-4,
        beta2=0.999,
        warmup_epochs=0,
        mixup=0.0,
        augment="timm",
        kd_weight=0.75,
        clip_norm=1e9,
    ),
)


def rank_of(model: nn.Module, config: UCT) -> int:
    """The rank that `config` gives this model.

    Raises:
        InputError: layers of a type are missing or differ in shape, or the rank is above what a type allows.
    """
    most = {}
    for kind, layers in dense_layers_by_type(model, config.layers).items():
        shapes = {tuple(layer.weight.shape) for layer in layers.values()}
        if len(shapes) > 1:
            raise InputError(
                f"the {kind} layers differ between blocks ({sorted(shapes)}); one factor cannot serve them all"
            )
        most[kind] = min(shapes.pop())
    rank = config.rank or max(1, round(config.rank_ratio * model.embed_dim))
    tight = [kind for kind, limit in most.items() if rank > limit]
    if tight:
        raise InputError(
            f"rank = {rank} is more than {', '.join(tight)} allow ({min(most.values())}); give 1 to {min(most.values())}"
        )
    return rank


def _ranks(model: nn.Module) -> list[dict[str, int]]:
    """From the width down, in 48 steps."""
    return [{"rank": rank} for rank in range(model.embed_dim, 0, -max(1, model.embed_dim // 48))]


@register(
    UCT, identity=UCT(layers=(), ends_bits=None, rest="float32", train=TrainConfig(epochs=0)), operating_points=_ranks
)
def uct(model: nn.Module, config: UCT, data: ImageData | None) -> nn.Module:
    """Code the blocks' linear layers with a factor that all blocks share, and train the codes."""
    if not config.layers and config.ends_bits is None:
        return model
    rank, teacher = rank_of(model, config) if config.layers else 0, find_teacher(model, config, data)
    torch.manual_seed(config.train.seed)
    coded = CodedModel(model, [*_coders(model, config, data, rank), *_ends(model, config)])
    _warm_up(coded, config)
    small = train_codes(coded, config, data, teacher, lambda mismatch: config.mse_weight * mismatch)
    for layer in factored_layers(small).values():
        layer.order = config.order
    return small


def with_order(model: nn.Module, order: Order) -> nn.Module:
    """The same compressed model (a copy) with its factored layers multiplying in another order."""
    model = copy.deepcopy(model)
    for layer in factored_layers(model).values():
        layer.order = order
    steps = [
        step.replace(config={**step.config, "order": order}) if step.method == "uct" else step
        for step in model.recipe.methods
    ]
    model.recipe = model.recipe.replace(methods=tuple(steps))
    return model


def _coders(model: nn.Module, config: UCT, data: ImageData | None, rank: int) -> list[FactorCoder]:
    grams = {}
    if config.form == "direct" and config.start == "activations" and config.layers:
        if data is None:
            raise InputError(
                "start=activations needs calibration images and no data set was given; give one, or start=weights"
            )
        grams = output_grams(model, vit.linear_layers(model, config.layers), data.require_split("calibration"))
    coders = []
    for kind in config.layers:
        layers = vit.linear_layers(model, (kind,))
        if config.form == "encoder":
            width, out = HIDDEN[kind] * model.embed_dim, next(iter(layers.values())).out_features
            left = Encoder(stack_weights(layers), width, rank)
            right = nn.Linear(rank, out, bias=False).weight.detach().T.contiguous()
        else:
            gram = sum(grams[name] / grams[name].trace() for name in layers) if grams else None
            latent, right = closed_form_factors(stack_weights(layers), rank, gram)
            left = DirectFactor(latent)
        coders.append(FactorCoder(kind, layers, left, right, config.bits))
        if config.form == "direct" or config.steps_first:
            coders[-1].init_steps(config.steps_rule)
    return coders


def _ends(model: nn.Module, config: UCT) -> list:
    if config.head_bits is None or config.ends_bits is None:
        return embedding_and_head_coders(model, config.ends_bits)
    patch, head = (
        embedding_and_head_coders(model, config.ends_bits, ("patch_embed.proj",)),
        embedding_and_head_coders(model, config.head_bits, ("head", "head_dist")),
    )
    return [*patch, *head]


def _warm_up(coded: CodedModel, config: UCT) -> None:
    """Fit the encoder form to the weights; its quantizers start, and join, half way (or from the first step)."""
    coders = [coder for coder in coded.coders if isinstance(coder, FactorCoder)]
    if config.form == "direct" or not coders:
        return
    parameters = [p for coder in coders for p in coder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, config.warm_steps), eta_min=1e-6)
    for coder in coders:
        coder.quantized = config.steps_first
    bar = progress.progress_bar(range(config.warm_steps), "warm start on the weights", unit="step")
    for step in bar:
        if step == config.warm_steps // 2 and not config.steps_first:
            _start_quantizers(coders, config.steps_rule)
        loss = sum(coder.regularizer(coder.decode()) for coder in coders)
        if not torch.isfinite(loss):
            raise InputError(
                f"the weights' error is {loss.item()} at step {step + 1} of the warm start; the given weights are not finite"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(mse=f"{loss.item():.2e}")
    if not all(coder.quantized for coder in coders):
        _start_quantizers(coders, config.steps_rule)


def _start_quantizers(coders: list[FactorCoder], rule: str) -> None:
    for coder in coders:
        coder.init_steps(rule)
        coder.quantized = True
