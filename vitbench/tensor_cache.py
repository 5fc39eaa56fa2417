"""Tensors that take a pass over images to make: made once, kept under the hash of what made them."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
            return load_file(file)
        except (SafetensorError, OSError):
            print(f"the {kind} in {file.name} cannot be read; they are made again")
    made = make()
    paths.writable_folder(file.parent, f"cache of {kind}")
    part = file.with_suffix(f".{os.getpid()}.part")
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, part)
    os.replace(part, file)
    return made
