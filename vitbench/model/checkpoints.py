"""Checkpoints as people have them: which tensors of a file are a model's, and what they are called in timm.

One table of names (`NAMES`) covers timm, facebook's DeiT, DINO and MAE, and transformers' ViT, DeiT and DINOv2 (version
4's and version 5's). A model is found in a file by those names, however deep it lies and whatever stands before them,
so that Lightning, DataParallel, torch.compile and training scripts need no rule of their own.
"""

import argparse
import hashlib
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vitbench.errors import InputError

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
