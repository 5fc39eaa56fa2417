"""UCT: low-bit factors of the weights, one of them shared by all blocks, trained end to end.

DeepCompress-ViT (CVPR 2025, pp. 30147-30156), "Unified Compression Training". For each type of linear layer, the weights
of all L blocks are stacked, M = [W_1^T; ...; W_L^T] (L in x out), and factored:

    M ~ Z D,    Z (L in x r) and D (r x out) in 4-bit codes,

with a step and a zero point for each column of Z, and a step for each column of D. Training minimises

    lambda ||Z D - M||^2 / (L in out) + (1 - k) CE + k KL(teacher || student)

over Z, D, the steps, and all other parameters of the ViT. In the paper an encoder computes Z from M ("encoder"). Since M is
constant and the encoder is linear in it, Z can also be a parameter itself ("direct"), which starts at a closed-form solution.
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

ENCODER_WIDTHS = {"qkv": 2, "proj": 1, "fc1": 2, "fc2": 1}  # by layer type; in units of the ViT's width


class UCT(CodedTrainingConfig):
    """Settings of UCT.

    Attributes:
        layers: the types of linear layers to factor.
        rank: r, the same for all types; None takes `rank_ratio` of the ViT's width.
        rank_ratio: 0.72 is the paper's value for DeiT-S (277 of 384). Below 0.75, re-ordered decoding needs fewer MACs than
            the dense layers.
        bits: bits of the codes of Z and of D.
        form: "direct" trains Z itself; "encoder" trains the paper's encoder.
        start: the error that the direct form's closed-form start minimises: that of the layers' outputs on calibration
            images ("activations"), with the same weight for each block, or that of the weights ("weights").
        mse_weight: lambda.
        order: the order of multiplication in the compressed layers, see `FactoredLinear`.
        warm_steps: steps on the weights' error alone, before the joint training of the encoder form (Adam, 1e-3 to 1e-6).
        steps_rule, steps_first: how the quantizers' steps are initialised, and whether that is before the warm start. The
            default is the least rounding error, halfway through the warm start.
        head_bits: bits of the head; None: `ends_bits`.
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


# The official code's choices: its encoder, quantizers initialised on the untrained encoder, a head that has 4 bits
# although 8 were intended, one learning rate, weights 1 : 1 : 3 of the three losses, no clipping. Here the last epoch is
# kept; the official code keeps the epoch that is best on its test images.
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
    """The rank for this model: `rank`, or `rank_ratio` of its width.

    Raises:
        InputError: layers of a type are missing or differ in shape, or the rank is above the smaller dimension of a type.
    """
    max_ranks = {}
    for kind, layers in dense_layers_by_type(model, config.layers).items():
        shapes = {tuple(layer.weight.shape) for layer in layers.values()}
        if len(shapes) > 1:
            raise InputError(
                f"the {kind} layers differ in shape between blocks ({sorted(shapes)}); leave {kind} out of layers"
            )
        max_ranks[kind] = min(shapes.pop())
    rank = config.rank or max(1, round(config.rank_ratio * model.embed_dim))
    too_small = [kind for kind, limit in max_ranks.items() if rank > limit]
    if too_small:
        raise InputError(
            f"rank = {rank} is more than {', '.join(too_small)} allow ({min(max_ranks.values())}); give 1 to "
            f"{min(max_ranks.values())}"
        )
    return rank


def _operating_points(model: nn.Module) -> list[dict[str, int]]:
    """Ranks from the ViT's width down to 1, in about 48 steps."""
    return [{"rank": rank} for rank in range(model.embed_dim, 0, -max(1, model.embed_dim // 48))]


@register(
    UCT,
    identity=UCT(layers=(), ends_bits=None, rest="float32", train=TrainConfig(epochs=0)),
    operating_points=_operating_points,
)
def uct(model: nn.Module, config: UCT, data: ImageData | None) -> nn.Module:
    """Factor the blocks' linear layers with a shared factor, quantize both factors, and train the codes."""
    if not config.layers and config.ends_bits is None:
        return model
    rank, teacher = rank_of(model, config) if config.layers else 0, find_teacher(model, config, data)
    torch.manual_seed(config.train.seed)
    coded = CodedModel(model, [*_coders(model, config, data, rank), *_end_coders(model, config)])
    _fit_encoders(coded, config)
    small = train_codes(coded, config, data, teacher, lambda mismatch: config.mse_weight * mismatch)
    for layer in factored_layers(small).values():
        layer.order = config.order
    return small


def with_order(model: nn.Module, order: Order) -> nn.Module:
    """A copy of the compressed model whose factored layers multiply in the given order."""
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
            width, out = ENCODER_WIDTHS[kind] * model.embed_dim, next(iter(layers.values())).out_features
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


def _end_coders(model: nn.Module, config: UCT) -> list:
    if config.head_bits is None or config.ends_bits is None:
        return embedding_and_head_coders(model, config.ends_bits)
    patch, head = (
        embedding_and_head_coders(model, config.ends_bits, ("patch_embed.proj",)),
        embedding_and_head_coders(model, config.head_bits, ("head", "head_dist")),
    )
    return [*patch, *head]


def _fit_encoders(coded: CodedModel, config: UCT) -> None:
    """Fit the encoder form to the weights. Quantization starts halfway, or with `steps_first` at the first step."""
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
                f"the weights' error is {loss.item()} at step {step + 1} of the warm start; give a model of finite weights"
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
