"""What knows timm's Vision Transformers: names, preprocessing, layer types, MACs; their blocks inside are blocks.py's."""

import copy
import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vitbench import blocks
from vitbench.errors import InputError
from vitbench.recipe import Architecture, Preprocess, Recipe
from vitbench.t2t import T2T_VITS, TokensToToken, sinusoids

LINEAR_TYPES = ("qkv", "proj", "fc1", "fc2")
ENDS = ("patch_embed.proj", "head", "head_dist")

# Small Vision Transformers for small images; the same timm class, so that every method applies to them unchanged.
SMALL_VITS = {
    "vit_micro_patch2_8": {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 4, "num_heads": 4},
    "vit_mini_patch2_8": {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4},
    "vit_mini_patch4_32": {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 6},
}
OWN_VITS = {**SMALL_VITS, **T2T_VITS}


def model_names() -> list[str]:
    """Names that `create_model` takes: vitbench's small models, T2T-ViTs and timm's Vision Transformers."""
    return [*OWN_VITS, *timm.list_models(["vit_*", "deit_*", "deit3_*"])]


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    img_size: int | None = None,
    depth: int | None = None,
    pretrained: bool = False,
    checkpoint: str | Path = "",
    seed: int = 0,
) -> VisionTransformer:
    """Make a Vision Transformer with a `recipe` attribute.

    Args:
        name: one of vitbench's own (`SMALL_VITS`, `T2T_VITS`) or any timm name whose class is VisionTransformer.
        num_classes: outputs of the head; None keeps the name's own.
        img_size: input height and width in pixels; None keeps the name's own.
        depth: how many blocks; None keeps the name's own.
        pretrained: load timm's weights (needs the network once). A head of another size starts afresh.
        checkpoint: a .safetensors or state-dict file in timm's names, loaded without executing anything in it.
        seed: of the random start.

    Raises:
        InputError: unknown name, another kind of model, weights that do not fit.
    """
    torch.manual_seed(seed)
    _check_name(name)
    if pretrained and (name in OWN_VITS or not timm.is_model_pretrained(name)):
        raise InputError(
            f"there are no pretrained weights for {name!r}; set pretrained=False and train it, or give a checkpoint"
        )
    if pretrained and checkpoint:
        raise InputError("both pretrained=True and a checkpoint were given; give one of them")
    model = _construct(name, pretrained, num_classes=num_classes, img_size=img_size, depth=depth)
    size = model.patch_embed.img_size[0]
    architecture = Architecture(name=name, num_classes=model.num_classes, img_size=size, depth=depth)
    origin = {"start": "random", "head": "random"}
    if pretrained:
        own_head = model.num_classes == model.pretrained_cfg["num_classes"]
        tag = model.pretrained_cfg.get("tag", "")
        origin = {"start": f"timm:{name.split('.')[0]}.{tag}".rstrip("."), "head": "same" if own_head else "random"}
    if checkpoint:
        origin = load_weights(model, checkpoint)
    model.recipe = Recipe(architecture=architecture, preprocess=_preprocess(model, name), origin=origin)
    return model.eval()


def skeleton(architecture: Architecture) -> VisionTransformer:
    """The structure of `architecture` without memory behind it (on the meta device)."""
    _check_name(architecture.name)
    with torch.device("meta"):
        changes = {key: getattr(architecture, key) for key in ("num_classes", "img_size", "depth")}
        model = _construct(architecture.name, False, weight_init="skip", **changes)
        if architecture.distillation_token:
            add_distillation_token(model)
        blocks.build(model, architecture)
        return model


def add_distillation_token(model: VisionTransformer) -> None:
    """Make `model` timm's VisionTransformerDistilled, in place: a second class token with a head of its own.

    (DeiT, Touvron et al. 2021, section 4.) Both start as copies of the first. The answer is the mean of both heads'.
    """
    if isinstance(model, VisionTransformerDistilled):
        return
    if model.num_prefix_tokens != 1 or model.global_pool != "token" or isinstance(model.blocks, blocks.TokenBlocks):
        raise InputError(
            "a distillation token needs a model with one class token, which it reads, and no fewer tokens on the way"
        )
    model.__class__ = VisionTransformerDistilled  # they differ in the second token and in the reading of both alone
    model.num_prefix_tokens, model.distilled_training = 2, False
    model.dist_token = nn.Parameter(model.cls_token.detach().clone())
    if not model.no_embed_class:
        place = model.pos_embed.detach()
        model.pos_embed = nn.Parameter(torch.cat([place[:, :1], place], dim=1))
    model.head_dist = copy.deepcopy(model.head)


def _check_name(name: str) -> None:
    """Only names that are registered here: a name with a hub's prefix would fetch what a stranger wrote."""
    if name in OWN_VITS or timm.is_model(name.split(".")[0]):
        return
    near = difflib.get_close_matches(name, model_names(), n=1)
    raise InputError(
        f"unknown model {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; allowed: "
        f"{', '.join(OWN_VITS)} and timm's vit_* and deit_* names (`vitbench list models` shows them)"
    )


def _construct(name: str, pretrained: bool, **changes: int | str | None) -> VisionTransformer:
    changes = {key: value for key, value in changes.items() if value is not None}
    if name in SMALL_VITS:
        model = VisionTransformer(**{"num_classes": 10, **SMALL_VITS[name], **changes})
        return model if changes.get("weight_init") == "skip" else _init_small(model)
    if name in T2T_VITS:
        return _t2t(**{**T2T_VITS[name], **changes})
    try:
        model = timm.create_model(name, pretrained=pretrained, **changes)
    except TypeError as error:  # a model without an img_size argument, for example
        raise InputError(f"{name!r} is not a Vision Transformer that vitbench can compress ({error})") from None
    except Exception as error:
        if not pretrained:
            raise
        reason = str(error).strip().splitlines()[0].split(". ")[0][:160]
        raise InputError(
            f"the pretrained weights of {name!r} could not be fetched ({reason}); check the network, or give a checkpoint file"
        ) from error
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


def _preprocess(model: VisionTransformer, name: str) -> Preprocess:
    size = model.patch_embed.img_size[0]
    if name in SMALL_VITS:
        return Preprocess(size=size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    # what is not said here is timm's default: bicubic, with ImageNet's mean and deviation
    config = timm.data.resolve_model_data_config(model, pretrained_cfg={"crop_pct": 0.9} if name in T2T_VITS else None)
    return Preprocess(
        size=size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
    )


def load_weights(model: VisionTransformer, path: str | Path) -> dict[str, str]:
    """Load a weights file into `model` in place; a head for another number of classes is left at its random start.

    Returns where the weights come from: `start`, the file's name and the beginning of its SHA-256, and `head`, "same"
    or "random".

    Raises:
        InputError: no such file, not a weights file, or weights of another architecture.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"checkpoint {str(path)!r} does not exist; give a .safetensors or state-dict file")
    try:
        state = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
        linear = isinstance(model.patch_embed, TokensToToken)  # timm's filter takes `proj` for a convolution
        proj = {key: state.pop(key) for key in ["patch_embed.proj.weight"] if linear and key in state}
        state = checkpoint_filter_fn(dict(state), model) | proj
    except Exception as error:  # each format's reader raises its own kinds
        reason = str(error).strip().splitlines()[0][:160]
        raise InputError(f"checkpoint {path.name!r} is not a safetensors or plain state-dict file ({reason})") from None
    own = model.state_dict()
    head = {key for key in own if key.startswith(("head.", "head_dist.")) and key in state}
    fresh_head = any(state[key].shape != own[key].shape for key in head)
    if fresh_head:
        state = {key: value for key, value in state.items() if key not in head} | {key: own[key] for key in head}
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if wrong or missing or surplus:
        details = [f"{key} is {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}" for key in wrong[:2]]
        details += [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (("missing", missing), ("unknown", surplus))
            if keys
        ]
        raise InputError(
            f"checkpoint {path.name!r} is of another architecture: {'; '.join(details)}; name the model that it was made for"
        )
    model.load_state_dict(state)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return {"start": f"{path.name}:{digest}", "head": "random" if fresh_head else "same"}


def layer_type(name: str) -> str:
    """Which of `LINEAR_TYPES` the module called `name` is or is a part of; "" for all else."""
    parts = name.split(".")
    return next((part for part in parts if part in LINEAR_TYPES), "") if parts[0] == "blocks" else ""


def linears(model: nn.Module, types: tuple[str, ...] = LINEAR_TYPES) -> dict[str, nn.Linear]:
    """The dense linear layers of the blocks by name, those inside a layer that was factored or split included."""
    return {
        name: module
        for name, module in model.named_modules()
        if layer_type(name) in types and isinstance(module, nn.Linear)
    }


def ends(model: nn.Module) -> dict[str, nn.Module]:
    """The dense layers at the two ends by name: the patch embedding's projection and the classifier (or both of them)."""
    found = {name: model.get_submodule(name) for name in ENDS if hasattr(model, name.partition(".")[0])}
    return {name: module for name, module in found.items() if isinstance(module, nn.Conv2d | nn.Linear)}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module called `name`, in place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def dense_layers(model: nn.Module, types: Sequence[str]) -> dict[str, dict[str, nn.Linear]]:
    """Type -> the dense linear layers of that type by name, at least one in each block.

    Raises:
        InputError: some blocks have no dense layer of a type.
    """
    found = {kind: linears(model, (kind,)) for kind in types}
    for kind, layers in found.items():
        blocks = {name.split(".")[1] for name in layers}
        if len(blocks) < len(model.blocks):
            raise InputError(
                f"{model.recipe.architecture.name} has a dense {kind} layer in {len(blocks)} of {len(model.blocks)} blocks "
                f"(compressed already, or of another design); give the uncompressed model, or layers without {kind}"
            )
    return found


def embedded(model: VisionTransformer, x: Tensor) -> Tensor:
    """The tokens (B, N, d) that the first block gets for images x (B, 3, H, W)."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


def token_count(model: VisionTransformer) -> int:
    """Tokens in the blocks for one image: patches and class or register tokens."""
    return model.patch_embed.num_patches + model.num_prefix_tokens


def set_fused_attention(model: nn.Module, fused: bool) -> None:
    """Choose between torch's fused attention kernel and the written-out softmax, in place."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def analytic_macs(model: VisionTransformer) -> int:
    """Multiply-accumulates for one image, from shapes alone: patch embedding, blocks (`blocks.macs`) and head.

    Norms, softmax and GELU are not counted, as is usual. Attention that a method replaced counts as full attention here;
    `measure.cost.count_macs` counts what really runs.
    """
    embed, shapes, d = model.patch_embed, blocks.shapes(model), model.embed_dim
    patch = embed.macs() if hasattr(embed, "macs") else embed.proj.weight.numel() * embed.num_patches
    sizes = ([getattr(shape, name) for shape in shapes] for name in ("heads", "head_dim", "neurons"))
    reduction = getattr(model.blocks, "reduction", None)
    inner = blocks.macs(*map(np.array, sizes), *blocks.tokens_through(shapes, token_count(model)), d, reduction)
    heads = 2 if hasattr(model, "head_dist") else 1
    return patch + int(inner) + heads * d * model.num_classes
