"""Files that carry the SHA-256 of what they hold, so that a damaged one is never taken for another result.

Three kinds: a tree of tensors and plain values (in safetensors' format, which cannot be executed), a tree of plain
values alone (JSON), and lines that are added one by one.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitbench.base.files import append_bytes, atomic_file, write_text

TENSOR, PAIRS, TUPLE = "tensor", "pairs", "tuple"
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class Damaged(ValueError):
    """The file does not hold what was written to it; the message says in which way."""


def write_tree(path: str | Path, tree: Any) -> None:
    """Write dictionaries, lists and tuples of tensors and JSON's values, whole or not at all.

    Keys are text or integers; tensors are kept with type and shape, on the CPU.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(tree, tensors, ""))
    content = safetensors.torch.save(tensors, metadata={"tree": text, "sha256": _sha256(text, tensors)})
    with atomic_file(path) as file:
        file.write(content)


def read_tree(path: str | Path) -> Any:
    """What `write_tree` wrote.

    Raises:
        Damaged: it was changed, cut short, or is another kind of file.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _sha256(facts["tree"], tensors) != facts["sha256"]:
            raise Damaged("its checksum is another")
        return _unpacked(json.loads(facts["tree"]), tensors)
    except Damaged:
        raise
    except UNREADABLE as error:
        raise Damaged(f"it cannot be read: {type(error).__name__}") from None


def write_json(path: str | Path, facts: Any) -> None:
    """Write JSON's values, whole or not at all."""
    write_text(path, json.dumps({"facts": facts, "sha256": _of(facts)}) + "\n")


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote; raises `Damaged` as `read_tree` does."""
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        if _of(held["facts"]) != held["sha256"]:
            raise Damaged("its checksum is another")
        return held["facts"]
    except Damaged:
        raise
    except UNREADABLE as error:
        raise Damaged(f"it cannot be read: {type(error).__name__}") from None


def add_line(path: str | Path, facts: Any) -> None:
    """Add one line of JSON's values to a file."""
    append_bytes(path, (json.dumps([facts, _of(facts)[:16]]) + "\n").encode())


def read_lines(path: str | Path) -> tuple[list[Any], int]:
    """What the whole lines hold, and how many are damaged. A killed process may leave half a line: it counts as none.

    Lines that are not whole are taken out of the file.
    """
    if not Path(path).is_file():
        return [], 0
    content = Path(path).read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    good = list(_good_lines(whole))
    kept = b"".join(line for line, _ in good)
    if kept != content:
        with atomic_file(path) as file:
            file.write(kept)
    return [facts for _, facts in good], whole.count(b"\n") - len(good)


def _good_lines(content: bytes) -> Iterator[tuple[bytes, Any]]:
    for line in content.splitlines(keepends=True):
        try:
            facts, check = json.loads(line)
        except UNREADABLE:
            continue
        if check == _of(facts)[:16]:
            yield line, facts


def _of(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _sha256(text: str, tensors: dict[str, Tensor]) -> str:
    """Of the text, and of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _packed(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """`value` as JSON's types: mappings name their kind, and tensors are put aside under their `path`."""
    if isinstance(value, Tensor):
        name = path if path not in tensors else f"{path}#{len(tensors)}"
        tensor = value.detach().cpu().contiguous()
        shared = {each.untyped_storage().data_ptr() for each in tensors.values() if each.numel()}
        tensors[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in shared else tensor
        return {TENSOR: name}
    if isinstance(value, dict):
        return {PAIRS: [[key, _packed(each, tensors, f"{path}/{key}".lstrip("/"))] for key, each in value.items()]}
    if isinstance(value, tuple):
        return {TUPLE: [_packed(each, tensors, f"{path}/{place}") for place, each in enumerate(value)]}
    if isinstance(value, list):
        return [_packed(each, tensors, f"{path}/{place}") for place, each in enumerate(value)]
    return value


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == TENSOR:
        return tensors[held]
    if kind == TUPLE:
        return tuple(_unpacked(each, tensors) for each in held)
    return {key: _unpacked(each, tensors) for key, each in held}
