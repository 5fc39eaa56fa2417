"""Vision Transformers by name: vitbench's own and timm's, with the requested sizes."""

import contextlib
import difflib
import functools

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitbench.base import hub
from vitbench.base.errors import InputError
from vitbench.model import blocks
from vitbench.model.t2t import T2T_VITS, TokensToToken, sinusoids

# Small Vision Transformers for small images. They are of timm's class, so every method applies to them unchanged.
SMALL_VITS = {
    "vit_micro_patch2_8": {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 4, "num_heads": 4},
    "vit_mini_patch2_8": {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4},
    "vit_mini_patch4_32": {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 6},
}
VITBENCH_MODELS = {**SMALL_VITS, **T2T_VITS}


@functools.cache
def model_names() -> tuple[str, ...]:
    """The names that `create_model` accepts: vitbench's small models, T2T-ViTs and timm's Vision Transformers."""
    return (*VITBENCH_MODELS, *(name for name in _timm_vit_names() if is_compressible(name)))


def check_name(name: str) -> None:
    """Raise `InputError` unless the name is registered: a name with a hub's prefix would download untrusted code."""
    if name in VITBENCH_MODELS or timm.is_model(name.split(".")[0]):
        return
    matches = difflib.get_close_matches(name, [*VITBENCH_MODELS, *_timm_vit_names()], n=1)
    raise InputError(
        f"unknown model {name!r}{f' (did you mean {matches[0]!r}?)' if matches else ''}; allowed: "
        f"{', '.join(VITBENCH_MODELS)} and timm's vit_* and deit_* names (`vitbench list models` shows them)"
    )


def _timm_vit_names() -> list[str]:
    return timm.list_models(["vit_*", "deit_*", "deit3_*"])


def is_compressible(name: str) -> bool:
    """Whether timm's model `name` is a Vision Transformer whose blocks vitbench can compress."""
    try:
        with torch.device("meta"):
            blocks.check_standard_blocks(construct(name, False, weight_init="skip", depth=1))
    except (InputError, AssertionError):  # a model of another class, which has no argument `depth`
        return False
    return True


def create_compressible(name: str, pretrained: bool, seed: int, **changes: int | str | None) -> VisionTransformer:
    """Make the model with weights drawn from `seed`, and check that its blocks can be compressed.

    Raises:
        InputError: the name's class does not take these sizes, or vitbench cannot compress its blocks.
    """
    torch.manual_seed(seed)
    try:
        model = construct(name, pretrained, **changes)
    except (AssertionError, RuntimeError, ZeroDivisionError) as error:  # timm's layers do not support these sizes
        sizes_text = (
            ", ".join(f"{key}={value}" for key, value in changes.items() if value is not None) or "its own sizes"
        )
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{name!r} cannot be made with {sizes_text} ({reason}); give other sizes") from None
    blocks.check_standard_blocks(model)
    return model


def check_img_size(model: VisionTransformer, name: str) -> None:
    """Raise `InputError` unless patches cover all pixels of an image."""
    embed, size = model.patch_embed, model.patch_embed.img_size[0]
    uncovered = embed.uncovered_pixels() if hasattr(embed, "uncovered_pixels") else size % embed.feat_ratio()
    patch = embed.feat_ratio()
    if size < patch and not hasattr(embed, "uncovered_pixels"):
        raise InputError(
            f"img_size = {size} is smaller than a patch of {name} ({patch} pixels); give {patch} or a multiple of it"
        )
    if uncovered:
        raise InputError(
            f"img_size = {size}: the patches of {name} ({patch} pixels) would not cover the last {uncovered} rows and columns; "
            f"give {size - size % patch} or {size - size % patch + patch}"
        )


def construct(name: str, pretrained: bool, **changes: int | str | None) -> VisionTransformer:
    """Make the model with the `changes` that are not None, without checking its blocks."""
    options = {key: value for key, value in changes.items() if value is not None}
    if name in SMALL_VITS:
        model = VisionTransformer(**{"num_classes": 10, **SMALL_VITS[name], **options})
        return model if options.get("weight_init") == "skip" else _init_small(model)
    if name in T2T_VITS:
        return _t2t(**{**T2T_VITS[name], **options})
    description = f"the pretrained weights of {name!r}"
    try:
        with hub.fetching(description, "give a checkpoint file") if pretrained else contextlib.nullcontext():
            model = timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:  # a model without an img_size argument, for example
        raise InputError(f"{name!r} is not a Vision Transformer that vitbench can compress ({error})") from None
    if not isinstance(model, VisionTransformer):
        raise InputError(
            f"{name!r} is a {type(model).__name__}, not a VisionTransformer; "
            f"allowed: timm's vit_* and deit_* models and {', '.join(VITBENCH_MODELS)}"
        )
    return model


def _init_small(model: VisionTransformer) -> VisionTransformer:
    """Draw weights for a small model, in place.

    Xavier weights suit narrow layers better than timm's fixed 0.02. A small patch embedding does not drown the positions.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            nn.init.xavier_uniform_(module.weight)
    nn.init.trunc_normal_(model.patch_embed.proj.weight, std=0.03)
    return model


def _t2t(**sizes: int | str) -> VisionTransformer:
    """Make a T2T-ViT: timm's class with another patch embedding, and learned positions that start from sinusoids."""
    model = VisionTransformer(embed_layer=TokensToToken, mlp_ratio=3.0, qkv_bias=False, **sizes)
    with torch.no_grad():
        model.pos_embed.copy_(sinusoids(*model.pos_embed.shape[1:]))
    return model
