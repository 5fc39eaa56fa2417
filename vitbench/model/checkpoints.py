"""Checkpoints as people have them: which tensors of a file are a model's, and what they are called in timm.

One table of names (`NAMES`) covers timm, facebook's DeiT, DINO and MAE, and transformers' ViT, DeiT and DINOv2 (version
4's and version 5's). A model is found in a file by those names, however deep it lies and whatever stands before them,
so that Lightning, DataParallel, torch.compile and training scripts need no rule of their own. Position embeddings are resized to
the model's grid, a head is loaded only for its own classes, and a tensor that does not fit is refused.
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

# A name, whole -> timm's. `#` and a number: one of the parts that timm has in one tensor. None: no part of a classifier.
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
    (r"decoder(?:_\w+)?(?:\..*)?", None),  # what a masked autoencoder guesses pixels with
)
_NAMES = tuple((re.compile(pattern), name) for pattern, name in NAMES)

# The names by which a model is found, and what stands before them.
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
    """The tensors of one model in timm's names, the `start` that a recipe notes, and what was done to get them, in words."""

    state: dict[str, Tensor]
    start: str
    said: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The file's name."""
        return self.start.rpartition(":")[0]


def read(path: str | Path, *, averaged: bool = True) -> Weights:
    """Read the model that a file holds. Nothing in the file is executed.

    Args:
        path: a .safetensors file, or one that torch.save wrote.
        averaged: where the file holds weights as trained and their average over training (EMA), take the average.

    Raises:
        InputError: no such file, not tensors alone, no model or several in it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder; name the weights file in it" if path.is_dir() else "does not exist"
        raise InputError(f"checkpoint {str(path)!r} {what}; give a .safetensors or state-dict file")
    content = _load(path)
    found = list(_models(content))
    if not found:
        names = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise InputError(
            f"checkpoint {path.name!r} is of another architecture: it holds no Vision Transformer in the names of timm or "
            f"transformers ({' '.join(names.split())[:120]}); give the file of such a model's state_dict"
        )
    place, prefix, tensors = _chosen(path, found, averaged)
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise InputError(f"checkpoint {path.name!r}: {key} is no dense tensor with values; save the whole tensors")
    state, said = _renamed(path, tensors, prefix)
    said = ((f"{place} taken",) if place else ()) + said
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return Weights(state, f"{path.name}:{digest}", said)


def _load(path: Path) -> Any:
    """What the file holds, read as data."""
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
    """The tensors that lie in a dictionary itself, by name."""
    items = content.items() if isinstance(content, Mapping) else ()
    return {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}


def _models(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Each model in the file: where it lies (dotted), what stands before its names, and the tensors beside it."""
    tensors = _tensors(content)
    if any(_FOREIGN.match(key) for key in tensors):
        yield place, "", tensors
        return
    counts = Counter(match[1] for key in tensors if (match := _MODEL.match(key)))
    for prefix, count in counts.items():
        if 2 * count >= max(counts.values()):  # a few stray names are no model
            yield place, prefix, tensors
    if isinstance(content, Mapping) and depth < _DEPTH:
        for key, inner in content.items():
            yield from _models(inner, f"{place}.{key}".lstrip("."), depth + 1)


def _chosen(
    path: Path, found: list[tuple[str, str, dict[str, Tensor]]], averaged: bool
) -> tuple[str, str, dict[str, Tensor]]:
    """The one of the models that is to be taken."""
    kinds = {True: [], False: []}
    for place, prefix, tensors in found:
        words = set(re.split(r"[._]", f"{place}.{prefix}".lower()))
        kinds[bool(words & _AVERAGED)].append((place, prefix, tensors))
    names = {
        kind: ", ".join(repr((place + "." + prefix).strip(".")) for place, prefix, _ in kinds[kind]) for kind in kinds
    }
    if not averaged and not kinds[False]:
        raise InputError(f"checkpoint {path.name!r} holds averaged weights alone ({names[True]}); take those")
    wanted = kinds[True] if averaged and kinds[True] else kinds[False]
    if len(wanted) > 1:
        raise InputError(
            f"checkpoint {path.name!r} holds {len(wanted)} models ({names[wanted is kinds[True]]}); save the state_dict of "
            "the one that is meant in a file of its own"
        )
    return wanted[0]


def _renamed(path: Path, tensors: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The model's tensors in timm's names, a classifier beside the model among them; and what was done."""
    above = [prefix[: place + 1] for place, letter in enumerate(prefix[:-1]) if letter == "."]
    outer = [*reversed(above), ""]
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    renamed, left_out = False, []
    for key in sorted(tensors, key=lambda key: not key.startswith(prefix)):  # the model's own before what is beside it
        inside = key.startswith(prefix)
        own = key.removeprefix(prefix if inside else next(p for p in outer if key.startswith(p)))
        name = _timms(own)
        if name is None or not (inside or (name.rpartition(".")[0] in HEADS and name not in state)):
            left_out.append(key)
            continue
        renamed |= name != own
        name, _, part = name.partition("#")
        if part:
            parts.setdefault(name, {})[int(part)] = tensors[key]
        elif name in state:
            raise InputError(
                f"checkpoint {path.name!r} holds {name} twice (once as {key}); save one model's state_dict"
            )
        else:
            state[name] = tensors[key]
    for name, some in parts.items():
        ordered = [some[index] for index in sorted(some)]
        if len({(part.dim(), part.shape[1:], part.dtype) for part in ordered}) > 1 or len(some) <= max(some):
            raise InputError(f"checkpoint {path.name!r} does not hold all parts of {name}, of one width; save it anew")
        state[name] = torch.cat([part.reshape(-1, *part.shape[1:]) for part in ordered])
    said = (f"prefix {prefix!r} removed",) if prefix else ()
    said += ("names changed to timm's",) if renamed else ()
    said += (f"{len(left_out)} other tensors left out (first: {left_out[0]})",) if left_out else ()
    return state, said


def _timms(name: str) -> str | None:
    """What timm calls the tensor; None for one that no classifier has."""
    for pattern, to in _NAMES:
        if match := pattern.fullmatch(name):
            return None if to is None else match.expand(to)
    return name


PATCH = "patch_embed.proj.weight"
RGB = 3  # channels of an image


def pools_tokens(weights: Weights, model: VisionTransformer) -> bool:
    """Whether the weights are of a model that averages its tokens before the norm (MAE's `fc_norm`) and this one does not."""
    state = weights.state
    return "fc_norm.weight" in state and "norm.weight" not in state and isinstance(model.fc_norm, nn.Identity)


@torch.no_grad()
def load(model: VisionTransformer, weights: Weights) -> tuple[tuple[str, ...], str]:
    """Put the weights into `model`, in place; a head that they lack, or have for other classes, keeps its random start.

    Returns what was done to make them fit, in words, and why the head is random; "" where it is the weights' own.

    Raises:
        InputError: weights of another architecture, or that are no finite floating-point numbers.
    """
    file, own = weights.file, model.state_dict()
    _check_numbers(file, weights.state, own)
    state, said = _converted(file, weights, model)
    state, channels = _channels(file, state, own)
    _check_numbers(file, state, own)
    state, lacking = _head(state, own)
    _check_fit(file, state, own)
    model.load_state_dict(state)
    return (*said, *channels), lacking


def _converted(file: str, weights: Weights, model: VisionTransformer) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors with patches and positions resampled for this model, and with what timm converts itself."""
    state, own = dict(weights.state), model.state_dict()
    given = state.get(PATCH)
    linear = own.get(PATCH, Tensor()).dim() != 4  # T2T-ViT's; timm's filter takes it for a convolution
    proj = {PATCH: state.pop(PATCH)} if linear and given is not None else {}
    _check_grid(file, state, model)
    try:
        state = checkpoint_filter_fn(state, model, adapt_layer_scale=True) | proj
    except Exception as error:  # a layout that timm expects other tensors in
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"checkpoint {file!r} is of another architecture: its tensors cannot be converted to this model's ({reason}); "
            "name the model that it was made for"
        ) from None
    said = []
    if (
        given is not None
        and PATCH in own
        and given.dim() == own[PATCH].dim() == 4
        and given.shape[2:] != own[PATCH].shape[2:]
    ):
        said.append(f"patches resampled from {given.shape[-1]} to {own[PATCH].shape[-1]} pixels")
    before, after = weights.state.get("pos_embed"), own.get("pos_embed")
    if before is not None and after is not None and before.shape != after.shape:
        said.append(f"position embedding resampled from {before.shape[-2]} to {after.shape[-2]} tokens")
    return state, tuple(said)


def _check_grid(file: str, state: dict[str, Tensor], model: VisionTransformer) -> None:
    """Positions that have to be resampled must be those of a square grid of patches."""
    place, own = state.get("pos_embed"), model.pos_embed
    if place is None or own is None or place.shape == own.shape or "register_tokens" in state:
        return
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    patches = place.shape[-2] - prefix if place.dim() == 3 else -1
    if patches < 1 or math.isqrt(patches) ** 2 != patches or place.shape[-1] != own.shape[-1]:
        raise InputError(
            f"checkpoint {file!r} is of another architecture: pos_embed is {tuple(place.shape)}, the model's "
            f"{tuple(own.shape)}, and can be resampled only from a square grid of patches behind {prefix} tokens of the same "
            "width; name the model that it was made for"
        )


def _channels(file: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A patch embedding of greyscale images made one of colour images, whose channels it sees the mean of."""
    changed = {}
    for key, wanted in own.items():
        given = state.get(key)
        if given is None or given.dim() != 4 or wanted.dim() != 4 or wanted.shape[1] != RGB or given.shape[1] == RGB:
            continue
        if given.shape[1] != 1:
            raise InputError(
                f"checkpoint {file!r} is of a model for images of {given.shape[1]} channels ({key}), and images have {RGB} "
                f"here; give one for {RGB} channels, or for 1"
            )
        changed[key] = given.expand(-1, RGB, -1, -1) / RGB
    return state | changed, tuple(f"{key} of 1 channel changed to see the mean of {RGB}" for key in changed)


def _check_numbers(file: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    for key, tensor in state.items():
        if key not in own or not own[key].is_floating_point():
            continue
        if not tensor.is_floating_point():
            raise InputError(
                f"checkpoint {file!r}: {key} holds {str(tensor.dtype).removeprefix('torch.')} values; weights are "
                "floating-point numbers here, so give those of before quantization"
            )
        if not tensor.float().isfinite().all():
            raise InputError(f"checkpoint {file!r}: {key} has values that are NaN or infinite; give undamaged weights")


def _head(state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The state with the model's own random heads where its heads are missing or of another size, and what is amiss."""
    wanted = {key for key in own if key.rpartition(".")[0] in HEADS}
    given = {key for key in state if key.rpartition(".")[0] in HEADS}
    wrong = sorted(key for key in given & wanted if state[key].shape != own[key].shape)
    if given and not wrong:
        return state, ""
    rest = {key: tensor for key, tensor in state.items() if key not in given}
    lacking = "there is none" if not given else f"{wrong[-1]} is {tuple(state[wrong[-1]].shape)}"
    return rest | {key: own[key] for key in wanted}, lacking


def _check_fit(file: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if not (wrong or missing or surplus):
        return
    details = [f"{key} is {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}" for key in wrong[:2]]
    details += [f"{len(wrong) - 2} more of another size"] if len(wrong) > 2 else []
    details += [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unknown", surplus))
        if keys
    ]
    raise InputError(
        f"checkpoint {file!r} is of another architecture: {'; '.join(details)}; name the model that it was made for"
    )
