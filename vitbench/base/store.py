"""The one store of work that takes long: made once, verified whenever it is read, gone on with after a stop.

Everything that a resume reads lies here or follows the same rules: training checkpoints, searches, moments, scores,
teachers' answers, reconstructed blocks and cached models.

- A key (`work_key`) is the hash of all that decides the result: what the caller gives (the model's digest, which is
  structure and tensors, the images' fingerprint, the settings), the code (`vitbench.base.code`), versions, threads, kind of device.
- A file carries the SHA-256 of what it holds. A damaged one is named in one line and made again.
- A file appears whole or not at all (`vitbench.base.files`).

Why no library: joblib.Memory keys on the text of one function and reads pickles, which run code; diskcache and SQLite keep
values without a checksum, diskcache as pickles too, and SQLite's locks are unsafe on network file systems.

Files that carry the SHA-256 of what they hold, so that a damaged one is never taken for another result.

Three kinds: a tree of tensors and plain values (in safetensors' format, which cannot be executed), a tree of plain
values alone (JSON), and lines that are added one by one.
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

PACKAGES = ("torch", "timm", "numpy", "PIL")  # what computes, and what prepares images


def work_key(room: str, inputs: dict[str, Any], device: str | torch.device = "cpu", packages: tuple = ()) -> str:
    """The key of a piece of work: equal only if everything is equal that decides its result.

    Args:
        room: the folder of the package whose code, with all rooms that it imports, does the work.
        inputs: what it is given, as JSON's values: digests of models, fingerprints of images, settings.
        device: where it is computed; the kind of device counts.
        packages: modules of installed ones that decide the result, beside `PACKAGES`.
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
    """One file of work that can be taken up again.

    Args:
        path: the file.
        description: what it holds, for messages, such as "checkpoint".
    """

    def __init__(self, path: str | Path, description: str):
        self.path, self.description = Path(path), description

    def load(self) -> Any:
        """The tree that was saved; None if there is none, or if it is damaged, which is said."""
        if not self.path.is_file():
            return None
        try:
            return read_tree(self.path)
        except CorruptFileError as error:
            print(f"the {self.description} {str(self.path)!r} is damaged ({error}); it is made again")
            return None

    def save(self, tree: Any) -> None:
        """Keep a tree of tensors and plain values in place of the one before."""
        paths.writable_folder(self.path.parent, f"folder of the {self.description}")
        write_tree(self.path, tree)

    def remove(self) -> None:
        """Forget it; its result is kept elsewhere."""
        self.path.unlink(missing_ok=True)


class Store:
    """The results of one kind of work, a file each, below the project's cache.

    Args:
        kind: a folder's name, and the word for messages.
    """

    def __init__(self, kind: str):
        self.kind = kind

    def file(self, key: str) -> StoredFile:
        """The file of a key."""
        return StoredFile(paths.model_cache() / self.kind / f"{key}.safetensors", f"file of {self.kind}")

    def tensors(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a key, by name: read, or made and kept."""
        file = self.file(key)
        tensors = file.load()
        if tensors is None:
            tensors = {name: tensor.contiguous() for name, tensor in make().items()}
            file.save(tensors)
        return tensors

    def journal(self, key: str) -> "Journal":
        """The notes of a key."""
        return Journal(paths.model_cache() / self.kind / f"{key}.jsonl", self.kind)


class Journal:
    """What a long search found so far, one note a line; a note that was being written when the process died is none.

    Args:
        path: the file; "" keeps nothing.
        description: what the notes are of, for messages.
    """

    def __init__(self, path: str | Path, description: str):
        self.path, self.description = Path(path) if path else None, description

    def read(self) -> dict[str, Any]:
        """What is noted, by name; damaged notes are left out, and that is said."""
        if self.path is None:
            return {}
        lines, damaged = read_lines(self.path)
        if damaged:
            print(
                f"{damaged} of the notes of {self.description} in {str(self.path)!r} are damaged; they are made again"
            )
        return dict(lines)

    def append(self, name: str, value: Any) -> None:
        """Note `value`, of JSON's types, under `name`."""
        if self.path is not None:
            paths.writable_folder(self.path.parent, f"folder of {self.description}")
            append_line(self.path, [name, value])


TENSOR, PAIRS, TUPLE = "tensor", "pairs", "tuple"
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class CorruptFileError(ValueError):
    """The file does not hold what was written to it; the message says in which way."""


def write_tree(path: str | Path, tree: Any) -> None:
    """Write dictionaries, lists and tuples of tensors and JSON's values, whole or not at all.

    Keys are text or integers; tensors are kept with type and shape, on the CPU.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(tree, tensors, ""))
    content = safetensors.torch.save(tensors, metadata={"tree": text, "sha256": _sha256(text, tensors)})
    with atomic_file(path) as file:
        file.write(content)


def read_tree(path: str | Path) -> Any:
    """What `write_tree` wrote.

    Raises:
        CorruptFileError: it was changed, cut short, or is another kind of file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _sha256(metadata["tree"], tensors) != metadata["sha256"]:
            raise CorruptFileError("its checksum is another")
        return _decode(json.loads(metadata["tree"]), tensors)
    except CorruptFileError:
        raise
    except UNREADABLE as error:
        raise CorruptFileError(f"it cannot be read: {type(error).__name__}") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON's values, whole or not at all."""
    write_text(path, json.dumps({"facts": value, "sha256": _json_sha256(value)}) + "\n")


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote; raises `CorruptFileError` as `read_tree` does."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if _json_sha256(content["facts"]) != content["sha256"]:
            raise CorruptFileError("its checksum is another")
        return content["facts"]
    except CorruptFileError:
        raise
    except UNREADABLE as error:
        raise CorruptFileError(f"it cannot be read: {type(error).__name__}") from None


def append_line(path: str | Path, value: Any) -> None:
    """Add one line of JSON's values to a file."""
    append_bytes(path, (json.dumps([value, _json_sha256(value)[:16]]) + "\n").encode())


def read_lines(path: str | Path) -> tuple[list[Any], int]:
    """What the whole lines hold, and how many are damaged. A killed process may leave half a line: it counts as none.

    Lines that are not whole are taken out of the file.
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
    """Of the text, and of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """`value` as JSON's types: mappings name their kind, and tensors are put aside under their `path`."""
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
