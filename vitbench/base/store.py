"""The store of long work: computed once, verified at each read, and resumed after an interruption.

It holds all that a resume reads: training checkpoints, searches, moments, scores, teachers' logits and reconstructed
blocks. Cached models follow the same rules.

- A key (`work_key`) is the hash of all that decides a result: the caller's inputs (the digest of the model's structure
  and tensors, the images' fingerprint, the settings), the code (`vitbench.base.code`), versions, threads, device type.
- A file carries the SHA-256 of its content. If it is damaged, a warning is printed and the result recomputed.
- Files are written atomically (`vitbench.base.files`).

There are three formats: a tree of tensors and plain values (safetensors, which cannot contain code), a tree of plain
values (JSON), and a file to which lines are appended.

No library does this. joblib.Memory keys on the text of one function and reads pickles, which can run code. diskcache
and SQLite keep values without a checksum; diskcache uses pickles, and SQLite's locks are unsafe on network file systems.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitbench.base import paths
from vitbench.base.code import code_digest
from vitbench.base.configs import digest
from vitbench.base.files import append_bytes, atomic_file, write_text

PACKAGES = ("torch", "timm", "numpy", "PIL")  # all results depend on their versions


def work_key(room: str, inputs: dict[str, Any], device: str | torch.device = "cpu", packages: tuple = ()) -> str:
    """The key of a piece of work. Two keys are equal only if everything that decides the result is equal.

    Args:
        room: the room of the package whose code does the work; the rooms that it imports are included.
        inputs: the work's inputs, as values of JSON's types: digests of models, fingerprints of images, settings.
        device: the device that computes; only its type is part of the key.
        packages: installed packages that decide the result, in addition to `PACKAGES`.
    """
    return digest(
        {
            "facts": inputs,
            "code": code_digest(room),
            "versions": {name: importlib.import_module(name).__version__ for name in (*PACKAGES, *packages)},
            "threads": torch.get_num_threads(),
            "device": torch.device(device).type,
        }
    )


class StoredFile:
    """One stored file of work that can be resumed.

    Args:
        path: the file.
        description: the file's content in words, for messages, such as "checkpoint".
    """

    def __init__(self, path: str | Path, description: str):
        self.path, self.description = Path(path), description

    def load(self) -> Any:
        """The saved tree; None if there is none, or if it is damaged, for which a warning is printed."""
        if not self.path.is_file():
            return None
        try:
            return read_tree(self.path)
        except CorruptFileError as error:
            print(f"the {self.description} {str(self.path)!r} is damaged ({error}); it is recomputed")
            return None

    def save(self, tree: Any) -> None:
        """Save a tree of tensors and plain values, which replaces the previous one."""
        paths.writable_folder(self.path.parent, f"folder of the {self.description}")
        write_tree(self.path, tree)

    def remove(self) -> None:
        """Delete the file, once the result is stored elsewhere."""
        self.path.unlink(missing_ok=True)


class Store:
    """The results of one kind of work, one file each, in a folder of the project's cache.

    Args:
        kind: the folder's name, also used in messages.
    """

    def __init__(self, kind: str):
        self.kind = kind

    def file(self, key: str) -> StoredFile:
        """The file of a key."""
        return StoredFile(paths.model_cache() / self.kind / f"{key}.safetensors", f"file of {self.kind}")

    def tensors(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a key, by name: read from the store, or computed by `make` and stored."""
        file = self.file(key)
        tensors = file.load()
        if tensors is None:
            tensors = {name: tensor.contiguous() for name, tensor in make().items()}
            file.save(tensors)
        return tensors

    def journal(self, key: str) -> "Journal":
        """The journal of a key."""
        return Journal(paths.model_cache() / self.kind / f"{key}.jsonl", self.kind)


class Journal:
    """The results of a long search so far, one note on each line; an incomplete last line is ignored.

    Args:
        path: the file; "" stores nothing.
        description: the search in words, for messages.
    """

    def __init__(self, path: str | Path, description: str):
        self.path, self.description = Path(path) if path else None, description

    def read(self) -> dict[str, Any]:
        """The values of all notes, by name. Damaged notes are left out, and a warning is printed."""
        if self.path is None:
            return {}
        lines, damaged = read_lines(self.path)
        if damaged:
            print(
                f"{damaged} of the notes of {self.description} in {str(self.path)!r} are damaged; they are recomputed"
            )
        return dict(lines)

    def append(self, name: str, value: Any) -> None:
        """Append a note: `value`, of JSON's types, under `name`."""
        if self.path is not None:
            paths.writable_folder(self.path.parent, f"folder of {self.description}")
            append_line(self.path, [name, value])


TENSOR, PAIRS, TUPLE = "tensor", "pairs", "tuple"
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class CorruptFileError(ValueError):
    """The file's content is not what was written; the message gives the reason."""


def write_tree(path: str | Path, tree: Any) -> None:
    """Write dictionaries, lists and tuples of tensors and JSON's values, atomically.

    Keys of dictionaries are text or integers. Tensors keep their dtype and shape, and are read on the CPU.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(tree, tensors, ""))
    content = safetensors.torch.save(tensors, metadata={"tree": text, "sha256": _sha256(text, tensors)})
    with atomic_file(path) as file:
        file.write(content)


def read_tree(path: str | Path) -> Any:
    """Read what `write_tree` wrote.

    Raises:
        CorruptFileError: the file was changed, is incomplete, or is of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _sha256(metadata["tree"], tensors) != metadata["sha256"]:
            raise CorruptFileError("its checksum does not match")
        return _decode(json.loads(metadata["tree"]), tensors)
    except CorruptFileError:
        raise
    except UNREADABLE as error:
        raise CorruptFileError(f"it cannot be read: {type(error).__name__}") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write a value of JSON's types, atomically."""
    write_text(path, json.dumps({"facts": value, "sha256": _json_sha256(value)}) + "\n")


def read_json(path: str | Path) -> Any:
    """Read what `write_json` wrote; raises `CorruptFileError` as in `read_tree`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if _json_sha256(content["facts"]) != content["sha256"]:
            raise CorruptFileError("its checksum does not match")
        return content["facts"]
    except CorruptFileError:
        raise
    except UNREADABLE as error:
        raise CorruptFileError(f"it cannot be read: {type(error).__name__}") from None


def append_line(path: str | Path, value: Any) -> None:
    """Append a value of JSON's types to a file, as one line."""
    append_bytes(path, (json.dumps([value, _json_sha256(value)[:16]]) + "\n").encode())


def read_lines(path: str | Path) -> tuple[list[Any], int]:
    """The values of the valid lines, and the number of damaged ones.

    Damaged lines, and an incomplete last line that a killed process may leave, are removed from the file.
    """
    if not Path(path).is_file():
        return [], 0
    content = Path(path).read_bytes()
    complete_lines = content[: content.rfind(b"\n") + 1]
    valid_lines = list(_good_lines(complete_lines))
    valid_bytes = b"".join(line for line, _ in valid_lines)
    if valid_bytes != content:
        with atomic_file(path) as file:
            file.write(valid_bytes)
    return [value for _, value in valid_lines], complete_lines.count(b"\n") - len(valid_lines)


def _good_lines(content: bytes) -> Iterator[tuple[bytes, Any]]:
    for line in content.splitlines(keepends=True):
        try:
            value, check = json.loads(line)
        except UNREADABLE:
            continue
        if check == _json_sha256(value)[:16]:
            yield line, value


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _sha256(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the text, and of each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """`value` as JSON's types. Tensors are added to `tensors` under their `path`; mappings name the original type."""
    if isinstance(value, Tensor):
        name = path if path not in tensors else f"{path}#{len(tensors)}"
        tensor = value.detach().cpu().contiguous()
        shared = {item.untyped_storage().data_ptr() for item in tensors.values() if item.numel()}
        tensors[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in shared else tensor
        return {TENSOR: name}
    if isinstance(value, dict):
        return {PAIRS: [[key, _encode(item, tensors, f"{path}/{key}".lstrip("/"))] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {TUPLE: [_encode(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
    return value


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == TENSOR:
        return tensors[content]
    if kind == TUPLE:
        return tuple(_decode(item, tensors) for item in content)
    return {key: _decode(item, tensors) for key, item in content}
