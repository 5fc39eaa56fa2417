"""Vision Transformers by name: vitbench's own and timm's, made with the sizes that are asked for."""

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

# Small Vision Transformers for small images; the same timm class, so that every method applies to them unchanged.
SMALL_VITS = {
    "vit_micro_patch2_8": {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 4, "num_heads": 4},
    "vit_mini_patch2_8": {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4},
    "vit_mini_patch4_32": {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 6},
}
OWN_VITS = {**SMALL_VITS, **T2T_VITS}


@functools.cache
def model_names() -> tuple[str, ...]:
    """Names that `create_model` takes: vitbench's small models, T2T-ViTs and timm's Vision Transformers."""
    return (*OWN_VITS, *(name for name in _timms() if fits(name)))


def check_name(name: str) -> None:
    """Only names that are registered here: a name with a hub's prefix would fetch what a stranger wrote."""
    if name in OWN_VITS or timm.is_model(name.split(".")[0]):
        return
    near = difflib.get_close_matches(name, [*OWN_VITS, *_timms()], n=1)
    raise InputError(
        f"unknown model {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; allowed: "
        f"{', '.join(OWN_VITS)} and timm's vit_* and deit_* names (`vitbench list models` shows them)"
    )


def _timms() -> list[str]:
    return timm.list_models(["vit_*", "deit_*", "deit3_*"])


def fits(name: str) -> bool:
    """Whether timm's `name` is a Vision Transformer with blocks that can be compressed."""
    try:
        with torch.device("meta"):
            blocks.check_standard_blocks(construct(name, False, weight_init="skip", depth=1))
    except (InputError, AssertionError):  # another class, whose blocks cannot be counted by `depth`
        return False
    return True


def made(name: str, pretrained: bool, seed: int, **changes: int | str | None) -> VisionTransformer:
    """The model with weights drawn by `seed`, whose blocks are of the kind that can be compressed."""
    torch.manual_seed(seed)
    try:
        model = construct(name, pretrained, **changes)
    except (AssertionError, RuntimeError, ZeroDivisionError) as error:  # sizes that timm's layers do not take
        given = ", ".join(f"{key}={value}" for key, value in changes.items() if value is not None) or "its own sizes"
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{name!r} cannot be made with {given} ({reason}); give other sizes") from None
    blocks.check_standard_blocks(model)
    return model


def check_size(model: VisionTransformer, name: str) -> None:
    """Each pixel of an image has to be in a patch."""
    embed, size = model.patch_embed, model.patch_embed.img_size[0]
    unseen = embed.unseen() if hasattr(embed, "unseen") else size % embed.feat_ratio()
    patch = embed.feat_ratio()
    if size < patch and not hasattr(embed, "unseen"):
        raise InputError(
            f"img_size = {size} is smaller than a patch of {name} ({patch} pixels); give {patch} or a multiple of it"
        )
    if unseen:
        raise InputError(
            f"img_size = {size}: the patches of {name} ({patch} pixels) would not see the last {unseen} rows and columns; "
            f"give {size - size % patch} or {size - size % patch + patch}"
        )


def construct(name: str, pretrained: bool, **changes: int | str | None) -> VisionTransformer:
    """The model by name with those of the `changes` that are not None, of whatever kind its blocks are."""
    changes = {key: value for key, value in changes.items() if value is not None}
    if name in SMALL_VITS:
        model = VisionTransformer(**{"num_classes": 10, **SMALL_VITS[name], **changes})
        return model if changes.get("weight_init") == "skip" else _init_small(model)
    if name in T2T_VITS:
        return _t2t(**{**T2T_VITS[name], **changes})
    what = f"the pretrained weights of {name!r}"
    try:
        with hub.fetching(what, "give a checkpoint file") if pretrained else contextlib.nullcontext():
            model = timm.create_model(name, pretrained=pretrained, **changes)
    except TypeError as error:  # a model without an img_size argument, for example
        raise InputError(f"{name!r} is not a Vision Transformer that vitbench can compress ({error})") from None
    if not isinstance(model, VisionTransformer):
        raise InputError(
            f"{name!r} is a {type(model).__name__}, not a VisionTransformer; "
            f"allowed: timm's vit_* and deit_* models and {', '.join(OWN_VITS)}"
        )
    return model


def _init_small(model: VisionTransformer) -> VisionTransformer:
    """Xavier weights suit narrow layers better than timm's fixed 0.02; a faint patch embedding lets positions count."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            nn.init.xavier_uniform_(module.weight)
    nn.init.trunc_normal_(model.patch_embed.proj.weight, std=0.03)
    return model


def _t2t(**sizes: int | str) -> VisionTransformer:
    """T2T-ViT is timm's class with another embedding; its position embedding starts from sinusoids and is learned."""
    model = VisionTransformer(embed_layer=TokensToToken, mlp_ratio=3.0, qkv_bias=False, **sizes)
    with torch.no_grad():
        model.pos_embed.copy_(sinusoids(*model.pos_embed.shape[1:]))
    return model
