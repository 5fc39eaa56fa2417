"""The one store of work that takes long: made once, verified whenever it is read, gone on with after a stop.

Everything that a resume reads lies here or follows the same rules: training checkpoints, searches, moments, scores,
teachers' answers, reconstructed blocks and cached models.

- A key (`work_key`) is the hash of all that decides the result: what the caller gives (the model's digest, which is
  structure and tensors, the images' fingerprint, the settings), the code (`code`), versions, threads, kind of device.
- A file carries the SHA-256 of what it holds (`checked`). A damaged one is named in one line and made again.
- A file appears whole or not at all (`files`).

Why no library: joblib.Memory keys on the text of one function and reads pickles, which run code; diskcache and SQLite keep
values without a checksum, diskcache as pickles too, and SQLite's locks are unsafe on network file systems.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitbench import paths
from vitbench.base import checked
from vitbench.base.code import code_digest
from vitbench.base.digest import digest

PACKAGES = ("torch", "timm", "numpy", "PIL")  # what computes, and what prepares images


def work_key(module: str, facts: dict[str, Any], device: str | torch.device = "cpu", packages: tuple = ()) -> str:
    """The key of a piece of work: equal only if everything is equal that decides its result.

    Args:
        module: the name of the module whose code, with all that it imports, does the work.
        facts: what it is given, as JSON's values: digests of models, fingerprints of images, settings.
        device: where it is computed; the kind of device counts.
        packages: modules of installed ones that decide the result, beside `PACKAGES`.
    """
    return digest(
        {
            "facts": facts,
            "code": code_digest(module),
            "versions": {name: importlib.import_module(name).__version__ for name in (*PACKAGES, *packages)},
            "threads": torch.get_num_threads(),
            "device": torch.device(device).type,
        }
    )


class Kept:
    """One file of work that can be taken up again.

    Args:
        path: the file.
        what: what it holds, for messages, such as "checkpoint".
    """

    def __init__(self, path: str | Path, what: str):
        self.path, self.what = Path(path), what

    def load(self) -> Any:
        """The tree that was saved; None if there is none, or if it is damaged, which is said."""
        if not self.path.is_file():
            return None
        try:
            return checked.read_tree(self.path)
        except checked.Damaged as error:
            print(f"the {self.what} {str(self.path)!r} is damaged ({error}); it is made again")
            return None

    def save(self, tree: Any) -> None:
        """Keep a tree of tensors and plain values in place of the one before."""
        paths.writable_folder(self.path.parent, f"folder of the {self.what}")
        checked.write_tree(self.path, tree)

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

    def file(self, key: str) -> Kept:
        """The file of a key."""
        return Kept(paths.model_cache() / self.kind / f"{key}.safetensors", f"file of {self.kind}")

    def tensors(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a key, by name: read, or made and kept."""
        file = self.file(key)
        found = file.load()
        if found is None:
            found = {name: tensor.contiguous() for name, tensor in make().items()}
            file.save(found)
        return found

    def notes(self, key: str) -> "Notes":
        """The notes of a key."""
        return Notes(paths.model_cache() / self.kind / f"{key}.jsonl", self.kind)


class Notes:
    """What a long search found so far, one note a line; a note that was being written when the process died is none.

    Args:
        path: the file; "" keeps nothing.
        what: what the notes are of, for messages.
    """

    def __init__(self, path: str | Path, what: str):
        self.path, self.what = Path(path) if path else None, what

    def read(self) -> dict[str, Any]:
        """What is noted, by name; damaged notes are left out, and that is said."""
        if self.path is None:
            return {}
        lines, damaged = checked.read_lines(self.path)
        if damaged:
            print(f"{damaged} of the notes of {self.what} in {str(self.path)!r} are damaged; they are made again")
        return dict(lines)

    def add(self, name: str, value: Any) -> None:
        """Note `value`, of JSON's types, under `name`."""
        if self.path is not None:
            paths.writable_folder(self.path.parent, f"folder of {self.what}")
            checked.add_line(self.path, [name, value])
