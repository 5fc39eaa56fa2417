"""Tensors that take a pass over images to make: made once, kept under the hash of what made them."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitbench import paths


def kept_tensors(
    kind: str, facts: Any, sources: Sequence[str], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `make` makes, from the cache where it was made before.

    Args:
        kind: a sub-folder of the cache, and the word for messages.
        facts: what the result depends on, JSON types; torch's version and thread count are added.
        sources: files of code that it depends on.
    """
    code = [Path(source).read_text(encoding="utf-8") for source in sources]
    text = json.dumps([facts, code, torch.get_num_threads(), torch.__version__])
    file = paths.model_cache() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    if file.is_file():
        try:
            return _read(file)
        except (SafetensorError, OSError, ValueError):
            print(f"the {kind} in {file.name} cannot be read; they are made again")
    made = {name: tensor.contiguous() for name, tensor in make().items()}
    paths.writable_folder(file.parent, f"cache of {kind}")
    part = file.with_suffix(f".{os.getpid()}.part")
    save_file(made, part, metadata={"sha256": _digest(made)})
    os.replace(part, file)
    return made


def _read(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as held:
        tensors, wanted = {name: held.get_tensor(name) for name in held.keys()}, (held.metadata() or {}).get("sha256")  # noqa: SIM118
    if _digest(tensors) != wanted:
        raise ValueError("damaged")
    return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
