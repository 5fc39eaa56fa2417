"""Training through codes: a ViT some of whose weights are decoded from coders at each step, and what it becomes.

A coder holds the trainable form of some weights. It decodes them for the forward pass, says how far they are from the
given ones, and at the end puts runtime layers with packed codes into the model. Everything else of the ViT (norms,
biases, embeddings) is tuned beside the coders with a learning rate and a weight decay of its own.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vitbench import artifact, training, vit
from vitbench.configs import Config
from vitbench.data import ImageData
from vitbench.errors import InputError
from vitbench.layers import PackedConv2d, PackedLinear
from vitbench.quantizers import LearnedStep
from vitbench.training import TrainConfig


class Coding(Config):
    """What methods that train codes have in common.

    Attributes:
        ends_bits: bits of the patch embedding and the head, one step for each output; None leaves them as they are.
        rest: how all that has no codes is stored.
        train: joint training with cross-entropy and distillation (`kd_weight`); 0 epochs rounds and leaves it at that.
        rest_lr: learning rate of the rest, as a multiple of `train.lr`.
        teacher: "original" (the given model), "none", or the folder of a saved model.
    """

    ends_bits: int | None = Field(default=8, ge=2, le=8)
    rest: Literal["float16", "float32"] = "float16"
    train: TrainConfig = TrainConfig()
    rest_lr: float = Field(default=0.1, ge=0)
    teacher: str = "original"


class Coder(nn.Module):
    """The trainable form of the weights of the modules called `names`."""

    names: list[str]

    def decode(self) -> dict[str, Tensor]:
        """Module name -> weight as it is after coding."""
        raise NotImplementedError

    def install(self, model: nn.Module) -> None:
        """Put runtime layers with the present codes into `model`."""
        raise NotImplementedError

    def mismatch(self, weights: dict[str, Tensor]) -> Tensor | float:
        """The loss on the decoded weights themselves."""
        return 0.0


class RowCoder(Coder):
    """Codes of one weight, a learned step for each output row (LSQ), started from the steps that round best.

    The weight is trained in units of each row's root mean square, so that one learning rate suits all.
    """

    def __init__(self, name: str, module: nn.Module, bits: int):
        super().__init__()
        self.names, self.bits, self.shape = [name], bits, module.weight.shape
        weight = module.weight.detach().flatten(1)
        self.register_buffer("scale", weight.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-8))
        self.value = nn.Parameter(weight / self.scale)
        self.steps = LearnedStep(len(weight), bits, dim=1)
        self.steps.start(self.value.detach())

    def decode(self) -> dict[str, Tensor]:
        return {self.names[0]: (self.steps(self.value) * self.scale).view(self.shape)}

    def install(self, model: nn.Module) -> None:
        codes, step, _ = self.steps.export(self.value)
        old = model.get_submodule(self.names[0])
        new = _packed_like(old, self.bits).fill(codes, step * self.scale.flatten(), old.bias)
        vit.replace_module(model, self.names[0], new)


def _packed_like(module: nn.Module, bits: int) -> PackedLinear | PackedConv2d:
    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        return PackedLinear(module.in_features, module.out_features, bits, bias)
    return PackedConv2d(module.in_channels, module.out_channels, module.kernel_size[0], bits, bias)


class CodedModel(nn.Module):
    """A ViT whose coded weights are decoded at each forward pass; while evaluating, once."""

    def __init__(self, model: nn.Module, coders: Sequence[Coder]):
        super().__init__()
        self.vit, self.coders, self.recipe = model, nn.ModuleList(coders), model.recipe
        self.embed_dim = model.embed_dim
        self.mismatch: Tensor | float = 0.0  # of the last forward pass in training
        self._decoded: dict[str, Tensor] | None = None
        model.requires_grad_(True)
        for coder in coders:
            for name in coder.names:
                model.get_submodule(name).weight.requires_grad_(False)

    def decode(self) -> dict[str, Tensor]:
        """The coded weights by parameter name. Fills `mismatch`."""
        weights, self.mismatch = {}, 0.0
        with torch.autocast(next(self.coders.parameters()).device.type, enabled=False):
            for coder in self.coders:
                decoded = coder.decode()
                self.mismatch = self.mismatch + coder.mismatch(decoded)
                weights |= {f"{name}.weight": weight for name, weight in decoded.items()}
        return weights

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            weights = self.decode()
        else:
            self._decoded = weights = self._decoded or self.decode()
        return torch.func.functional_call(self.vit, weights, (x,))

    def train(self, mode: bool = True) -> "CodedModel":
        self._decoded = None
        return super().train(mode)

    def param_groups(self, config: TrainConfig, rest_lr: float) -> list[dict[str, Any]]:
        """For the optimiser: the coders without weight decay; the rest with it, except vectors."""
        rest = [p for p in self.vit.parameters() if p.requires_grad] if rest_lr else []
        return [
            {"params": [p for p in self.coders.parameters() if p.requires_grad], "weight_decay": 0.0, "lr_scale": 1.0},
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay, "lr_scale": rest_lr},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": rest_lr},
        ]

    def finish(self, rest: str) -> nn.Module:
        """The compressed model: runtime layers for what was coded, `rest` for the other tensors."""
        model = self.vit
        for coder in self.coders:
            coder.install(model)
        for module in model.modules():
            if hasattr(module, "connect"):
                module.connect(model.shared)
        if rest == "float16":
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point():
                    tensor.data.copy_(_nearest_half(tensor.data))
                    if not torch.isfinite(tensor).all():
                        raise InputError("a value of the model does not fit float16; give rest=float32")
        model.recipe = model.recipe.having(storage=rest)
        return model


def _nearest_half(x: Tensor) -> Tensor:
    """x as float16 would hold it; a value that is not 0 stays so (a step of 0 would lose its row)."""
    least = torch.finfo(torch.float16).smallest_normal
    return torch.where((x != 0) & (x.abs() < least), least * x.sign(), x).half().float()


def dense_layers(model: nn.Module, types: Sequence[str]) -> dict[str, dict[str, nn.Linear]]:
    """Type -> the dense linear layers of that type by name, one in each block.

    Raises:
        InputError: some blocks have no dense layer of a type.
    """
    found = {kind: vit.linears(model, (kind,)) for kind in types}
    for kind, layers in found.items():
        if len(layers) < len(model.blocks):
            raise InputError(
                f"{model.recipe.architecture.name} has a dense {kind} layer in {len(layers)} of {len(model.blocks)} blocks "
                f"(compressed already, or of another design); give the uncompressed model, or layers without {kind}"
            )
    return found


def ends(model: nn.Module, bits: int | None, names: Sequence[str] = ("patch_embed.proj", "head")) -> list[Coder]:
    """Coders of the patch embedding and the head (or the one in `names`), or none."""
    found = {} if bits is None else vit.ends(model)
    return [RowCoder(name, module, bits) for name, module in found.items() if name in names]


def train_codes(
    coded: CodedModel, config: Coding, data: ImageData | None, teacher: nn.Module | None, penalty: float = 0.0
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train a coded model jointly, and finish it. Returns the compressed model and the history of the training."""
    history: list[dict[str, float]] = []
    if config.train.epochs:
        checkpoint = training.checkpoint_path(coded, data, config)
        _, history = training.train(
            coded,
            data,
            config.train,
            teacher=teacher,
            checkpoint=checkpoint,
            groups=coded.param_groups(config.train, config.rest_lr),
            penalty=(lambda: penalty * coded.mismatch) if penalty else None,
            title="training the codes",
        )
        checkpoint.unlink(missing_ok=True)
    return coded.cpu().finish(config.rest), history


def find_teacher(model: nn.Module, config: Coding, data: ImageData | None) -> nn.Module | None:
    """The teacher that `config` names, after checking that it and the images suit the student `model`.

    Raises:
        InputError: no images to train on, or of other classes; a teacher of other classes or with another input.
    """
    own = model.recipe
    classes = own.architecture.num_classes
    if config.train.epochs and data is None:
        raise InputError("training the codes needs images and no data set was given; give one, or train.epochs=0")
    if config.train.epochs and len(data.classes) != classes:
        raise InputError(
            f"the model has {classes} outputs and {data.name} has {len(data.classes)} classes; give the images that the "
            "model was made for, or train.epochs=0"
        )
    if config.teacher in ("none", "original"):
        return copy.deepcopy(model).requires_grad_(False) if config.teacher == "original" else None
    found = artifact.load(Path(config.teacher))
    other = found.recipe
    if other.architecture.num_classes != classes:
        raise InputError(
            f"the teacher {config.teacher!r} answers {other.architecture.num_classes} classes and the student {classes}; "
            "give a teacher trained on the same classes, or teacher=original"
        )
    if other.preprocess != own.preprocess:
        raise InputError(
            f"the teacher {config.teacher!r} takes images prepared in another way ({other.preprocess}) than the student "
            f"({own.preprocess}); give a teacher with the same input, or teacher=original"
        )
    return found
