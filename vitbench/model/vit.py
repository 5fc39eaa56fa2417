"""timm's Vision Transformers: making them, their preprocessing and their layers by type. blocks.py handles the blocks."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitbench.base.errors import InputError
from vitbench.model import blocks, checkpoints, names
from vitbench.model.macs import analytic_macs as analytic_macs
from vitbench.model.recipe import Architecture, Preprocess, Recipe
from vitbench.model.t2t import T2T_VITS, TokensToToken, use_official_form

LINEAR_TYPES: Final = ("qkv", "proj", "fc1", "fc2")
EMBEDDING_AND_HEADS = ("patch_embed.proj", "head", "head_dist")


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    img_size: int | None = None,
    depth: int | None = None,
    pretrained: bool = False,
    checkpoint: str | Path = "",
    ema: bool = True,
    new_head: bool = False,
    seed: int = 0,
) -> VisionTransformer:
    """Make a Vision Transformer with a `recipe` attribute. Conversions of a checkpoint are printed in one line.

    Args:
        name: one of vitbench's own (`names.SMALL_VITS`, `t2t.T2T_VITS`) or any timm name whose class is VisionTransformer.
        num_classes: outputs of the head; None keeps the name's default.
        img_size: input height and width in pixels, a multiple of the patch's; None keeps the name's default.
        depth: how many blocks; None keeps the name's default.
        pretrained: load timm's weights (needs the network once).
        checkpoint: weights for this model: a .safetensors file or one that torch.save wrote, in the names of timm or
            transformers (`vitbench.model.checkpoints`). Nothing in it is executed.
        ema: if the checkpoint also has weights averaged over training, take those.
        new_head: if the weights have no head for `num_classes`, start a random one, which needs training.
        seed: of the random weights.

    Raises:
        InputError: the name is unknown or another kind of model, its patches do not cover the size, or the weights do not fit.
    """
    names.check_name(name)
    for option, value in (("num_classes", num_classes), ("img_size", img_size), ("depth", depth)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise InputError(f"{option} = {value!r}: give a whole number from 1 up (images are square)")
    if pretrained and (name in names.VITBENCH_MODELS or not timm.is_model_pretrained(name)):
        raise InputError(
            f"there are no pretrained weights for {name!r}; set pretrained=False and train it, or give a checkpoint"
        )
    if pretrained and checkpoint:
        raise InputError("both pretrained=True and a checkpoint were given; give one of them")
    weights = checkpoints.read_checkpoint(checkpoint, averaged=ema) if checkpoint else None
    changes = {"num_classes": num_classes, "img_size": img_size, "depth": depth}
    global_pool: Literal["avg"] | None = None
    model = names.create_compressible(name, pretrained, seed, **changes)
    if weights and checkpoints.uses_mean_pooling(weights, model):
        global_pool = "avg"
        model = names.create_compressible(name, False, seed, global_pool=global_pool, **changes)
    if model.num_classes < 1:
        raise InputError(
            f"{name!r} has no default number of classes; give one: num_classes=10, or --classes 10 in a command"
        )
    names.check_img_size(model, name)
    size = model.patch_embed.img_size[0]
    token_attention: Literal["official"] | None = None
    if isinstance(model.patch_embed, TokensToToken):
        use_official_form(model)
        token_attention = "official"
    architecture = Architecture(
        name=name,
        num_classes=model.num_classes,
        img_size=size,
        depth=depth,
        global_pool=global_pool,
        token_attention=token_attention,
    )
    origin, head_problem = {"start": "random", "head": "random"}, ""
    conversions: tuple[str, ...] = ()
    if pretrained:
        pretrained_classes = model.pretrained_cfg["num_classes"]
        head_problem = "" if model.num_classes == pretrained_classes else f"they are for {pretrained_classes}"
        start = f"timm:{name.split('.')[0]}.{model.pretrained_cfg.get('tag', '')}".rstrip(".")
        origin = {"start": start, "head": "random" if head_problem else "same"}
    if weights:
        weight_changes, head_problem = checkpoints.load_weights(model, weights)
        conversions = (
            *weights.conversions,
            *(["tokens averaged before the norm"] if global_pool else []),
            *weight_changes,
        )
        conversions += (f"new random head for {model.num_classes} classes ({head_problem})",) if head_problem else ()
        origin = {"start": weights.start, "head": "random" if head_problem else "same"}
        origin |= {"taken": "; ".join(conversions)} if conversions else {}
    if head_problem and not new_head:
        raise InputError(
            f"the weights of {weights.file if weights else name} have no head for {model.num_classes} classes ({head_problem}), "
            "and a random one classifies by chance: give the number of classes that they have, train (train.epochs above 0), "
            "or give new_head=True and train the model yourself"
        )
    if weights and conversions:
        print(f"took {weights.file}: {'; '.join(conversions)}")
    model.recipe = Recipe(architecture=architecture, preprocess=_preprocess(model, name), origin=origin)
    return model.eval()


def meta_model(architecture: Architecture) -> VisionTransformer:
    """A model with the structure of `architecture` on the meta device, so that its tensors take no memory."""
    names.check_name(architecture.name)
    with torch.device("meta"):
        changes = {key: getattr(architecture, key) for key in ("num_classes", "img_size", "depth", "global_pool")}
        model = names.construct(architecture.name, False, weight_init="skip", **changes)
        if architecture.token_attention:
            use_official_form(model)
        if architecture.distillation_token:
            add_distillation_token(model)
        blocks.resize_blocks(model, architecture)
        return model


def add_distillation_token(model: VisionTransformer) -> None:
    """Make `model` timm's VisionTransformerDistilled, in place: with a second class token and a head for it.

    Both start as copies of the first. The output is the mean of both heads' logits (DeiT, Touvron et al. 2021, section 4).

    Raises:
        InputError: the head does not read one class token, or the model reduces its tokens.
    """
    if isinstance(model, VisionTransformerDistilled):
        return
    if model.num_prefix_tokens != 1 or model.global_pool != "token" or isinstance(model.blocks, blocks.TokenBlocks):
        raise InputError(
            "a distillation token needs a model whose head reads its one class token and that keeps all tokens; give such a model"
        )
    model.__class__ = VisionTransformerDistilled  # the classes differ only in the second token and its head
    model.num_prefix_tokens, model.distilled_training = 2, False
    model.dist_token = nn.Parameter(model.cls_token.detach().clone())
    if not model.no_embed_class:
        pos_embed = model.pos_embed.detach()
        model.pos_embed = nn.Parameter(torch.cat([pos_embed[:, :1], pos_embed], dim=1))
    model.head_dist = copy.deepcopy(model.head)


def _preprocess(model: VisionTransformer, name: str) -> Preprocess:
    size = model.patch_embed.img_size[0]
    if name in names.SMALL_VITS:
        return Preprocess(size=size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    # timm's defaults fill the rest: bicubic, with ImageNet's mean and deviation
    config = timm.data.resolve_model_data_config(model, pretrained_cfg={"crop_pct": 0.9} if name in T2T_VITS else None)
    return Preprocess(
        size=size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
    )


def layer_type(name: str) -> str:
    """The entry of `LINEAR_TYPES` that the module `name` is, or is a part of; "" for all other modules."""
    parts = name.split(".")
    return next((part for part in parts if part in LINEAR_TYPES), "") if parts[0] == "blocks" else ""


def linear_layers(model: nn.Module, layer_types: tuple[str, ...] = LINEAR_TYPES) -> dict[str, nn.Linear]:
    """The dense linear layers of the blocks by name, with those inside factored and split layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if layer_type(name) in layer_types and isinstance(module, nn.Linear)
    }


def embedding_and_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The dense layers of the patch embedding and of the head (of both heads, if there are two), by name."""
    modules = {
        name: model.get_submodule(name) for name in EMBEDDING_AND_HEADS if hasattr(model, name.partition(".")[0])
    }
    return {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module called `name` by `new`, in place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def dense_layers_by_type(model: nn.Module, layer_types: Sequence[str]) -> dict[str, dict[str, nn.Linear]]:
    """Type -> the dense linear layers of that type by name, at least one in each block.

    Raises:
        InputError: a block has no dense layer of one of the types.
    """
    by_type = {type_name: linear_layers(model, (type_name,)) for type_name in layer_types}
    for type_name, layers in by_type.items():
        blocks = {name.split(".")[1] for name in layers}
        if len(blocks) < len(model.blocks):
            raise InputError(
                f"{model.recipe.architecture.name} has a dense {type_name} layer in {len(blocks)} of {len(model.blocks)} blocks "
                f"(compressed already, or of another design); give the uncompressed model, or layers without {type_name}"
            )
    return by_type


def embed_patches(model: VisionTransformer, x: Tensor) -> Tensor:
    """The first block's input tokens (B, N, d) for images x (B, 3, H, W)."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


def token_count(model: VisionTransformer) -> int:
    """Tokens of one image in the blocks: patches, class token and registers."""
    return model.patch_embed.num_patches + model.num_prefix_tokens


def set_fused_attention(model: nn.Module, fused: bool) -> None:
    """Choose between torch's fused attention kernel and the written-out softmax, in place."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
