"""Folders that this project writes: what may lie at their place, and how they come to lie there whole."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from vitbench.base.files import PART, naming, part_name
from vitbench.errors import InputError
from vitbench.paths import probe


@dataclass(frozen=True)
class Kind:
    """A kind of folder that this project writes, and by what it is known again.

    Attributes:
        name: as people say it, "a saved model".
        manifest: the file that is written last; it holds a JSON object.
        keys: what that object has.
        files: the names of the folder's other files, from that object.
    """

    name: str
    manifest: str
    keys: frozenset[str]
    files: Callable[[dict[str, Any]], Iterable[str]]

    def own(self, folder: Path) -> set[str]:
        """The names of the files in `folder` that this project wrote; empty if it is not of this kind."""
        try:
            content = json.loads((folder / self.manifest).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return set()
        if not isinstance(content, dict) or not content.keys() >= self.keys:
            return set()
        listed = {self.manifest, *self.files(content)}
        return {
            entry.name for entry in os.scandir(folder) if entry.name in listed and entry.is_file(follow_symlinks=False)
        }


def check_target(path: str | Path, kind: Kind) -> Path:
    """Where a folder of this kind would be written; links are followed, and nothing is made yet.

    Call it before any work, so that a folder that cannot be written is known then.

    Raises:
        InputError: something else is there, which writing would delete, or there is no way to write.
    """
    target = Path(os.path.realpath(Path(path).expanduser()))
    try:
        if not target.is_dir():
            if os.path.lexists(target):
                raise InputError(f"{str(path)!r} is a file, and {kind.name} is a folder; give another name")
            probe(next(folder for folder in target.parents if os.path.lexists(folder)))
            return target
        strangers = _strangers(target, kind)
        if not strangers:
            probe(target)
            return target
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be written ({error.strerror}); give a folder with free space that you own"
        ) from None
    named = repr(strangers[0]) + (f" and {len(strangers) - 1} more" if len(strangers) > 1 else "")
    if kind.own(target):
        raise InputError(
            f"{str(path)!r} holds {kind.name} and beside it {named}, which would be lost; move that away or give a new folder"
        )
    raise InputError(
        f"{str(path)!r} holds {named} and is not {kind.name}, so it is left alone; give a new or an empty folder"
    )


def _strangers(folder: Path, kind: Kind) -> list[str]:
    """Names in `folder` that this project did not write there."""
    own = kind.own(folder)
    return sorted(name for name in os.listdir(folder) if name not in own and not PART.fullmatch(name))


@contextlib.contextmanager
def atomic_folder(path: str | Path, kind: Kind) -> Iterator[Path]:
    """A new folder to fill with files; when the block ends well, they lie at `path`, and else nothing there has changed.

    A folder of the same kind is replaced, file by file and the manifest last: a folder that is a link, somebody's current
    one or a mount stays what it is. A new one appears with all of its files at once.

    Raises:
        InputError: as `check_target`'s.
        OSError: no space; its `filename` is the file at its final place, and no part is left.
    """
    target = check_target(path, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = (target if target.is_dir() else target.parent) / part_name()
    try:
        with naming(target, part):
            part.mkdir()  # its mode follows the umask
            yield part
            if target.is_dir():
                _move_in(part, check_target(target, kind), kind)
            else:
                part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move_in(part: Path, target: Path, kind: Kind) -> None:
    old = kind.own(target)
    new = sorted((file.name for file in part.iterdir()), key=lambda name: (name == kind.manifest, name))
    for name in new:
        os.replace(part / name, target / name)
    for name in old - set(new):
        (target / name).unlink(missing_ok=True)
    for left in target.iterdir():  # what a process that was killed left
        if (found := PART.fullmatch(left.name)) and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
