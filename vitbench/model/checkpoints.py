"""Checkpoints of timm, transformers and training scripts: finding a model's tensors in a file and naming them as timm does.

One table of names (`NAMES`) covers timm, facebook's DeiT, DINO and MAE, and transformers' ViT, DeiT and DINOv2 (versions
4 and 5). A model is found in a file by those names, at any depth and after any prefix, so Lightning, DataParallel,
torch.compile and training scripts need no rule of their own. Position embeddings are resized to the model's grid, a head
is loaded only for its own number of classes, and a tensor that does not fit is an error.
"""

import argparse
import hashlib
import math
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vitbench.base.errors import InputError

_BLOCK = r"(?:encoder\.layer|layers)\.(\d+)\."  # transformers 4 and 5

# A full name -> timm's. `#` and a number: a part of what timm has in one tensor. None: a tensor that no classifier has.
NAMES: tuple[tuple[str, str | None], ...] = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.distillation_token", r"dist_token"),
    (r"embeddings\.position_embeddings", r"pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (_BLOCK + r"(?:layernorm_before|norm1)\.(\w+)", r"blocks.\1.norm1.\2"),
    (_BLOCK + r"(?:layernorm_after|norm2)\.(\w+)", r"blocks.\1.norm2.\2"),
    (_BLOCK + r"attention\.(?:attention\.query|q_proj)\.(\w+)", r"blocks.\1.attn.qkv.\2#0"),
    (_BLOCK + r"attention\.(?:attention\.key|k_proj)\.(\w+)", r"blocks.\1.attn.qkv.\2#1"),
    (_BLOCK + r"attention\.(?:attention\.value|v_proj)\.(\w+)", r"blocks.\1.attn.qkv.\2#2"),
    (_BLOCK + r"attention\.(?:output\.dense|o_proj)\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (_BLOCK + r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"mlp\.gate_proj\.(\w+)", r"blocks.\1.mlp.fc1.\2#0"),
    (_BLOCK + r"mlp\.up_proj\.(\w+)", r"blocks.\1.mlp.fc1.\2#1"),
    (_BLOCK + r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (_BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),
    (r"layernorm\.(\w+)", r"norm.\1"),
    (r"(?:classifier|cls_classifier)\.(weight|bias)", r"head.\1"),
    (r"distillation_classifier\.(weight|bias)", r"head_dist.\1"),
    (r"pooler\..*", None),
    (r"decoder(?:_\w+)?(?:\..*)?", None),  # a masked autoencoder's, which predicts pixels
)
_NAMES = tuple((re.compile(pattern), name) for pattern, name in NAMES)

# The names by which a model is found, after their prefix.
_MODEL = re.compile(
    r"((?:.*?\.)??)(?:patch_embed\.|blocks\.\d+\.|embeddings\.(?:cls_token|patch_emb|position)|encoder\.layer\.\d+\.|"
    r"layers\.\d+\.(?:attention|layernorm|mlp)[._])"
)
_FOREIGN = re.compile(r"(?:module\.)?(?:visual|radio_model|preprocessor|beit3|vision_encoder)\.")  # timm converts these
_AVERAGED = {"ema", "averaged", "swa", "teacher", "momentum", "target"}  # words for weights averaged over training
_DEPTH = 4  # dictionaries in dictionaries

HEADS = ("head", "head_dist")


@dataclass(frozen=True)
class Weights:
    """The tensors of one model in timm's names.

    Attributes:
        state: name -> tensor.
        start: the file's name and hash, as the recipe's origin has them.
        conversions: what was changed to get these tensors, in words.
    """

    state: dict[str, Tensor]
    start: str
    conversions: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The file's name."""
        return self.start.rpartition(":")[0]


def read_checkpoint(path: str | Path, *, averaged: bool = True) -> Weights:
    """Read the model in a file. Nothing in the file is executed.

    Args:
        path: a .safetensors file, or one that torch.save wrote.
        averaged: if the file holds both the trained weights and their average over training (EMA), take the average.

    Raises:
        InputError: there is no such file, or it holds other objects than tensors, no model, or several models.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        problem = "is a folder; name the weights file in it" if path.is_dir() else "does not exist"
        raise InputError(f"checkpoint {str(path)!r} {problem}; give a .safetensors or state-dict file")
    content = _load(path)
    models = list(_models(content))
    if not models:
        names = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise InputError(
            f"checkpoint {path.name!r} is of another architecture: it holds no Vision Transformer in the names of timm or "
            f"transformers ({' '.join(names.split())[:120]}); give the file of such a model's state_dict"
        )
    key_path, prefix, tensors = _select_model(path, models, averaged)
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise InputError(f"checkpoint {path.name!r}: {key} is no dense tensor with values; save dense tensors")
    state, conversions = _to_timm_names(path, tensors, prefix)
    conversions = ((f"{key_path} taken",) if key_path else ()) + conversions
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return Weights(state, f"{path.name}:{digest}", conversions)


def _load(path: Path) -> Any:
    """Read the file's content as data, without executing it."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts put their options into the file
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"checkpoint {path.name!r} is not a safetensors or plain state-dict file: it holds Python objects beside "
            "tensors (a whole module, perhaps), which are not executed; save model.state_dict() alone and give that"
        ) from None
    except Exception as error:  # each format's reader raises its own kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"checkpoint {path.name!r} is not a safetensors or plain state-dict file ({reason})") from None


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors among a dictionary's own values, by name."""
    items = content.items() if isinstance(content, Mapping) else ()
    return {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}


def _models(content: Any, key_path: str = "", depth: int = 0) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Each model in the file: the dotted path of its dictionary, its names' prefix, and all tensors of that dictionary."""
    tensors = _tensors(content)
    if any(_FOREIGN.match(key) for key in tensors):
        yield key_path, "", tensors
        return
    counts = Counter(match[1] for key in tensors if (match := _MODEL.match(key)))
    for prefix, count in counts.items():
        if 2 * count >= max(counts.values()):  # a few stray names are not a model
            yield key_path, prefix, tensors
    if isinstance(content, Mapping) and depth < _DEPTH:
        for key, inner in content.items():
            yield from _models(inner, f"{key_path}.{key}".lstrip("."), depth + 1)


def _select_model(
    path: Path, models: list[tuple[str, str, dict[str, Tensor]]], averaged: bool
) -> tuple[str, str, dict[str, Tensor]]:
    """The model to load: the averaged one where `averaged` is set and there is one, else the other."""
    by_averaged: dict[bool, list[tuple[str, str, dict[str, Tensor]]]] = {True: [], False: []}
    for key_path, prefix, tensors in models:
        words = set(re.split(r"[._]", f"{key_path}.{prefix}".lower()))
        by_averaged[bool(words & _AVERAGED)].append((key_path, prefix, tensors))
    names = {
        kind: ", ".join(repr((key_path + "." + prefix).strip(".")) for key_path, prefix, _ in by_averaged[kind])
        for kind in by_averaged
    }
    if not averaged and not by_averaged[False]:
        raise InputError(
            f"checkpoint {path.name!r} holds only averaged weights ({names[True]}); set ema=True (leave out --no-ema) to "
            "take them"
        )
    selected = by_averaged[True] if averaged and by_averaged[True] else by_averaged[False]
    if len(selected) > 1:
        raise InputError(
            f"checkpoint {path.name!r} holds {len(selected)} models ({names[selected is by_averaged[True]]}); save the "
            "state_dict of one of them in a separate file"
        )
    return selected[0]


def _to_timm_names(path: Path, tensors: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The model's tensors in timm's names, with a classifier that lies beside the model; and the conversions in words."""
    parent_prefixes = [prefix[: index + 1] for index, letter in enumerate(prefix[:-1]) if letter == "."]
    prefixes = [*reversed(parent_prefixes), ""]
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    renamed, left_out = False, []
    for key in sorted(tensors, key=lambda key: not key.startswith(prefix)):  # the model's own names come first
        is_in_model = key.startswith(prefix)
        short_key = key.removeprefix(prefix if is_in_model else next(p for p in prefixes if key.startswith(p)))
        name = _timm_name(short_key)
        if name is None or not (is_in_model or (name.rpartition(".")[0] in HEADS and name not in state)):
            left_out.append(key)
            continue
        renamed |= name != short_key
        name, _, part = name.partition("#")
        slot: dict[Any, Tensor] = parts.setdefault(name, {}) if part else state
        place = int(part) if part else name
        if place in slot or name in (state if part else parts):
            raise InputError(
                f"checkpoint {path.name!r} holds {name} twice (once as {key}); save one model's state_dict"
            )
        slot[place] = tensors[key]
    for name, tensor_parts in parts.items():
        ordered = [tensor_parts[index] for index in sorted(tensor_parts)]
        if len({(part.dim(), part.shape[1:], part.dtype) for part in ordered}) > 1 or len(tensor_parts) <= max(
            tensor_parts
        ):
            raise InputError(f"checkpoint {path.name!r} does not hold all parts of {name}, of one width; save it anew")
        state[name] = torch.cat([part.reshape(-1, *part.shape[1:]) for part in ordered])
    conversions: tuple[str, ...] = (f"prefix {prefix!r} removed",) if prefix else ()
    conversions += ("names changed to timm's",) if renamed else ()
    conversions += (f"{len(left_out)} other tensors left out (first: {left_out[0]})",) if left_out else ()
    return state, conversions


def _timm_name(name: str) -> str | None:
    """timm's name of the tensor; None for a tensor that no classifier has."""
    for pattern, to in _NAMES:
        if match := pattern.fullmatch(name):
            return None if to is None else match.expand(to)
    return name


PATCH = "patch_embed.proj.weight"
RGB = 3  # channels of an image


def uses_mean_pooling(weights: Weights, model: VisionTransformer) -> bool:
    """Whether the weights' model averages its tokens before the norm (MAE's `fc_norm`) while `model` does not."""
    state = weights.state
    return "fc_norm.weight" in state and "norm.weight" not in state and isinstance(model.fc_norm, nn.Identity)


@torch.no_grad()
def load_weights(model: VisionTransformer, weights: Weights) -> tuple[tuple[str, ...], str]:
    """Load the weights into `model`, in place. A head that they lack, or have for other classes, keeps its random start.

    Returns:
        The conversions that made the weights fit, in words, and why the head is random ("" if it was loaded).

    Raises:
        InputError: the weights are of another architecture, or are not finite floating-point numbers.
    """
    file, model_state = weights.file, model.state_dict()
    _check_numbers(file, weights.state, model_state)
    state, conversions = _resample(file, weights, model)
    state, channel_changes = _adapt_channels(file, state, model_state)
    _check_numbers(file, state, model_state)
    state, head_problem = _adapt_heads(state, model_state)
    _check_fit(file, state, model_state)
    model.load_state_dict(state)
    return (*conversions, *channel_changes), head_problem


def _resample(file: str, weights: Weights, model: VisionTransformer) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Resample patches and positions for this model, and apply timm's own conversions."""
    state, model_state = dict(weights.state), model.state_dict()
    checkpoint_tensor = state.get(PATCH)
    linear = model_state.get(PATCH, Tensor()).dim() != 4  # T2T-ViT's; timm's filter expects a convolution
    proj = {PATCH: state.pop(PATCH)} if linear and checkpoint_tensor is not None else {}
    _check_grid(file, state, model)
    try:
        state = checkpoint_filter_fn(state, model, adapt_layer_scale=True) | proj
    except Exception as error:  # timm's filter expects other tensors in this layout
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"checkpoint {file!r} is of another architecture: its tensors cannot be converted to this model's ({reason}); "
            "name the model that it was made for"
        ) from None
    conversions = []
    if (
        checkpoint_tensor is not None
        and PATCH in model_state
        and checkpoint_tensor.dim() == model_state[PATCH].dim() == 4
        and checkpoint_tensor.shape[2:] != model_state[PATCH].shape[2:]
    ):
        conversions.append(
            f"patches resampled from {checkpoint_tensor.shape[-1]} to {model_state[PATCH].shape[-1]} pixels"
        )
    before, after = weights.state.get("pos_embed"), model_state.get("pos_embed")
    if before is not None and after is not None and before.shape != after.shape:
        conversions.append(f"position embedding resampled from {before.shape[-2]} to {after.shape[-2]} tokens")
    return state, tuple(conversions)


def _check_grid(file: str, state: dict[str, Tensor], model: VisionTransformer) -> None:
    """Raise `InputError` unless positions that need resampling are those of a square grid of patches."""
    pos_embed, model_pos_embed = state.get("pos_embed"), model.pos_embed
    if (
        pos_embed is None
        or model_pos_embed is None
        or pos_embed.shape == model_pos_embed.shape
        or "register_tokens" in state
    ):
        return
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    patches = pos_embed.shape[-2] - prefix if pos_embed.dim() == 3 else -1
    if patches < 1 or math.isqrt(patches) ** 2 != patches or pos_embed.shape[-1] != model_pos_embed.shape[-1]:
        raise InputError(
            f"checkpoint {file!r} is of another architecture: pos_embed is {tuple(pos_embed.shape)}, the model's "
            f"{tuple(model_pos_embed.shape)}, and can be resampled only from a square grid of patches after {prefix} tokens "
            "of the same width; name the model that it was made for"
        )


def _adapt_channels(
    file: str, state: dict[str, Tensor], model_state: dict[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Change a patch embedding for greyscale images into one for colour images, which takes the mean of their channels."""
    changed = {}
    for key, model_tensor in model_state.items():
        checkpoint_tensor = state.get(key)
        if (
            checkpoint_tensor is None
            or checkpoint_tensor.dim() != 4
            or model_tensor.dim() != 4
            or model_tensor.shape[1] != RGB
            or checkpoint_tensor.shape[1] == RGB
        ):
            continue
        if checkpoint_tensor.shape[1] != 1:
            raise InputError(
                f"checkpoint {file!r} is of a model for images of {checkpoint_tensor.shape[1]} channels ({key}), and "
                f"vitbench's images have {RGB}; give one for {RGB} channels, or for 1"
            )
        changed[key] = checkpoint_tensor.expand(-1, RGB, -1, -1) / RGB
    return state | changed, tuple(f"{key} of 1 channel changed to see the mean of {RGB}" for key in changed)


def _check_numbers(file: str, state: dict[str, Tensor], model_state: dict[str, Tensor]) -> None:
    for key, tensor in state.items():
        if key not in model_state or not model_state[key].is_floating_point():
            continue
        if not tensor.is_floating_point():
            raise InputError(
                f"checkpoint {file!r}: {key} holds {str(tensor.dtype).removeprefix('torch.')} values; vitbench loads "
                "floating-point weights, so give those from before quantization"
            )
        if not tensor.float().isfinite().all():
            raise InputError(f"checkpoint {file!r}: {key} has values that are NaN or infinite; give undamaged weights")


def _adapt_heads(state: dict[str, Tensor], model_state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The state with the model's random heads, if its own are missing or of another size, and the problem in words."""
    model_keys = {key for key in model_state if key.rpartition(".")[0] in HEADS}
    checkpoint_keys = {key for key in state if key.rpartition(".")[0] in HEADS}
    mismatched = sorted(key for key in checkpoint_keys & model_keys if state[key].shape != model_state[key].shape)
    if checkpoint_keys and not mismatched:
        return state, ""
    other_tensors = {key: tensor for key, tensor in state.items() if key not in checkpoint_keys}
    problem = "there is none" if not checkpoint_keys else f"{mismatched[-1]} is {tuple(state[mismatched[-1]].shape)}"
    return other_tensors | {key: model_state[key] for key in model_keys}, problem


def _check_fit(file: str, state: dict[str, Tensor], model_state: dict[str, Tensor]) -> None:
    mismatched = [key for key in model_state if key in state and state[key].shape != model_state[key].shape]
    missing, unexpected = sorted(model_state.keys() - state.keys()), sorted(state.keys() - model_state.keys())
    if not (mismatched or missing or unexpected):
        return
    details = [
        f"{key} is {tuple(state[key].shape)}, the model's {tuple(model_state[key].shape)}" for key in mismatched[:2]
    ]
    details += [f"{len(mismatched) - 2} more of another size"] if len(mismatched) > 2 else []
    details += [
        f"{len(keys)} {description} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for description, keys in (("missing", missing), ("unknown", unexpected))
        if keys
    ]
    raise InputError(
        f"checkpoint {file!r} is of another architecture: {'; '.join(details)}; name the model that it was made for"
    )
