"""UCT: low-bit factors of the weights, one of them shared by all blocks, trained end to end.

DeepCompress-ViT (CVPR 2025, pp. 30147-30156), "Unified Compression Training". For each type of linear layer, the weights
of all L blocks are stacked, M = [W_1^T; ...; W_L^T] (L in x out), and factored:

    M ~ Z D,    Z (L in x r) and D (r x out) in 4-bit codes,

with a step and a zero point for each column of Z, and a step for each column of D. Training minimises

    lambda ||Z D - M||^2 / (L in out) + (1 - k) CE + k KL(teacher || student)

over Z, D, the steps, and all other parameters of the ViT. In the paper an encoder computes Z from M ("encoder"). Since M is
constant and the encoder is linear in it, Z can also be a parameter itself ("direct").

What training can win back depends on where it starts. "second_order" starts near the answer: the blocks are aligned, so that
one D suits all (`vitbench.calibration.alignment`), and the codes are fitted to the outputs of the layers, block by block
(`vitbench.calibration.shared`). Its codes have no zero points, and each Z_l has steps of its own. "activations" and "weights"
truncate M at once and round to the nearest codes.
"""

import copy
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from vitbench.base import progress
from vitbench.base.errors import InputError, one_of
from vitbench.calibration.alignment import align_blocks
from vitbench.calibration.coders import Coder, check_group, embedding_and_head_coders
from vitbench.calibration.factors import (
    DirectFactor,
    Encoder,
    FactorCoder,
    closed_form_factors,
    output_grams,
    stack_weights,
)
from vitbench.calibration.moments import collect_moments
from vitbench.calibration.shared import FactorShape, choose_forms, shared_codes
from vitbench.data.splits import ImageData
from vitbench.methods.method import register
from vitbench.model import vit
from vitbench.model.layers.factored import Order, factored_layers
from vitbench.model.layers.packed import Bits
from vitbench.model.vit import LINEAR_TYPES, dense_layers_by_type
from vitbench.training.coded import CodedModel, CodedTrainingConfig, bytes_without, train_codes
from vitbench.training.compressed import Compressed
from vitbench.training.config import TrainConfig
from vitbench.training.tuning import find_teacher

LayerType = Literal["qkv", "proj", "fc1", "fc2"]
Rank = Annotated[int, Field(ge=1)]
ENCODER_WIDTHS = {"qkv": 2, "proj": 1, "fc1": 2, "fc2": 1}  # by layer type; in units of the ViT's width


class UCT(CodedTrainingConfig):
    """Settings of UCT.

    Attributes:
        layers: the types of linear layers to factor.
        dense_bits: bits of the codes of the other types, in second order; None leaves them in floating point.
        target_bytes: the bytes of all tensors of the compressed model. Each layer type then gets factors or codes of its own,
            with ranks and bits chosen by `vitbench.calibration.shared.choose_forms`; `layers`, `dense_bits`, `rank`, `ranks`, `bits`
            and `latent_bits` are not used. With `start` "second_order" alone.
        rank: r, the same for all types; None takes `rank_ratio` of the ViT's width.
        ranks: the ranks of single types, in place of `rank`.
        rank_ratio: 0.72 is the paper's value for DeiT-S (277 of 384). Below 0.75, re-ordered decoding needs fewer MACs than
            the dense layers.
        bits: bits of the codes of D, and of Z without `latent_bits`.
        latent_bits: bits of the codes of Z.
        group: values of a row that share a step in "second_order" codes; None: all.
        form: "direct" trains Z itself; "encoder" trains the paper's encoder.
        start: of the direct form. "second_order" fits aligned factors and their codes to the layers' outputs on calibration
            images; "activations" truncates for these outputs, with the same weight for each block; "weights" for the weights.
        align: whether "second_order" aligns the blocks before.
        mse_weight: lambda.
        order: the order of multiplication in the compressed layers, see `FactoredLinear`.
        warm_steps: steps on the weights' error alone, before the joint training of the encoder form (Adam, 1e-3 to 1e-6).
        steps_rule, steps_first: how the quantizers' steps are initialised, and whether that is before the warm start. The
            default is the least rounding error, halfway through the warm start.
        head_bits: bits of the head; None: `ends_bits`.
    """

    layers: tuple[LayerType, ...] = LINEAR_TYPES
    dense_bits: Bits | None = None
    target_bytes: int | None = Field(default=None, ge=1)
    rank: int | None = Field(default=None, ge=1)
    ranks: dict[str, Rank] = {}
    rank_ratio: float = Field(default=0.72, gt=0, le=1)
    bits: int = Field(default=4, ge=2, le=8)
    latent_bits: Bits | None = None
    group: int | None = Field(default=None, ge=2)
    form: Literal["direct", "encoder"] = "direct"
    start: Literal["second_order", "activations", "weights"] = "second_order"
    align: bool = True
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


def ranks_of(model: nn.Module, config: UCT) -> dict[str, int]:
    """Layer type -> its rank in this model: `rank`, or `rank_ratio` of the model's width.

    Raises:
        InputError: layers of a type are missing or differ in shape, or a rank is above what the type allows: its outputs, and
            without `start` "second_order" also its inputs.
    """
    stacked = config.form == "direct" and config.start == "second_order"  # Z may have more rows than a layer has inputs
    ranks, limits = {}, {}
    for kind in config.ranks:
        one_of("layer type in ranks", kind, config.layers)
    for kind, layers in dense_layers_by_type(model, config.layers).items():
        shapes = {tuple(layer.weight.shape) for layer in layers.values()}
        if len(shapes) > 1:
            raise InputError(
                f"the {kind} layers differ in shape between blocks ({sorted(shapes)}); leave {kind} out of layers"
            )
        outputs, inputs = shapes.pop()
        limits[kind] = outputs if stacked else min(outputs, inputs)
        ranks[kind] = config.ranks.get(kind) or config.rank or max(1, round(config.rank_ratio * model.embed_dim))
    if too_small := {kind: limit for kind, limit in limits.items() if ranks[kind] > limit}:
        limit = min(too_small.values())
        raise InputError(
            f"rank = {max(ranks[kind] for kind in too_small)} is more than {', '.join(too_small)} allow ({limit}); give 1 to {limit}"
        )
    return ranks


def _operating_points(model: nn.Module) -> list[dict[str, int]]:
    """Ranks from the ViT's width down to 1, in about 48 steps."""
    return [{"rank": rank} for rank in range(model.embed_dim, 0, -max(1, model.embed_dim // 48))]


@register(
    UCT,
    identity=UCT(layers=(), ends_bits=None, rest="float32", train=TrainConfig(epochs=0)),
    operating_points=_operating_points,
)
def uct(model: nn.Module, config: UCT, data: ImageData | None) -> Compressed:
    """Factor the blocks' linear layers with a shared factor, quantize both factors, and train the codes."""
    if not (config.layers or config.dense_bits or config.target_bytes or config.ends_bits):
        return Compressed(model)
    ranks, teacher = ranks_of(model, config), find_teacher(model, config, data)
    torch.manual_seed(config.train.seed)
    if config.form == "direct" and config.start == "second_order":
        coders = _second_order_coders(model, config, data, ranks)
    else:
        coders = _coders(model, config, data, ranks)
    coded = CodedModel(model, [*coders, *_end_coders(model, config)])
    _fit_encoders(coded, config)
    small = train_codes(coded, config, data, teacher, lambda mismatch: config.mse_weight * mismatch)
    for layer in factored_layers(small.model).values():
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


def _second_order_coders(
    model: nn.Module, config: UCT, data: ImageData | None, ranks: Mapping[str, int]
) -> list[Coder]:
    """Align the model, factor its layers, and round them in second order, in place."""
    kinds = config.layers if config.dense_bits is None and config.target_bytes is None else LINEAR_TYPES
    if not kinds:
        return []
    if data is None:
        raise InputError(
            "start=second_order needs calibration images and no data set was given; give one, or start=weights"
        )
    split, layers = data.require_split("calibration"), dense_layers_by_type(model, kinds)
    if config.align:
        align_blocks(model, split)
    names = vit.linear_layers(model, tuple(kinds))
    moments = collect_moments(model, dict(names), data, gradients=config.target_bytes is not None)
    inputs = {name: layer.in_features for name, layer in names.items()}
    forms: dict[str, FactorShape | float]
    if config.target_bytes is not None:
        check_group(inputs, config.group)
        budget = config.target_bytes - bytes_without(model, config, names)
        forms = choose_forms(layers, moments, budget, config.group, config.rest)
    else:
        check_group(inputs | {f"D of {kind}": rank for kind, rank in ranks.items()}, config.group)
        latent_bits = config.latent_bits or config.bits
        forms = {kind: FactorShape(rank, config.bits, latent_bits) for kind, rank in ranks.items()}
        if config.dense_bits is not None:
            forms |= {kind: config.dense_bits for kind in layers if kind not in ranks}
    return shared_codes(model, copy.deepcopy(model), forms, moments, split, config.group)


def _coders(model: nn.Module, config: UCT, data: ImageData | None, ranks: Mapping[str, int]) -> list[Coder]:
    if config.dense_bits is not None or config.target_bytes is not None or config.group or config.latent_bits:
        raise InputError(
            "dense_bits, target_bytes, group and latent_bits are settings of start=second_order with form=direct"
        )
    grams = {}
    if config.form == "direct" and config.start == "activations" and config.layers:
        if data is None:
            raise InputError(
                "start=activations needs calibration images and no data set was given; give one, or start=weights"
            )
        grams = output_grams(model, vit.linear_layers(model, config.layers), data.require_split("calibration"))
    coders: list[Coder] = []
    for kind in config.layers:
        layers, rank = vit.linear_layers(model, (kind,)), ranks[kind]
        if config.form == "encoder":
            width, out = ENCODER_WIDTHS[kind] * model.embed_dim, next(iter(layers.values())).out_features
            left = Encoder(stack_weights(layers), width, rank)
            right = nn.Linear(rank, out, bias=False).weight.detach().T.contiguous()
        else:
            gram = sum(grams[name] / grams[name].trace() for name in layers) if grams else None
            latent, right = closed_form_factors(stack_weights(layers), rank, gram)
            left = DirectFactor(latent)
        coder = FactorCoder(kind, layers, left, right, config.bits)
        if config.form == "direct" or config.steps_first:
            coder.init_steps(config.steps_rule)
        coders.append(coder)
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
