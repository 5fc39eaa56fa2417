"""Folders of image files: which sub-folders are splits, which are classes, and what is left out.

The folders at the top are splits only if every one of them has a split's name (`SPLITS`, in any case) and holds class
folders; otherwise every one of them is a class. Names of files decide nothing. A class has the images at any depth below it.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vitbench.base.errors import InputError
from vitbench.data.decoding import SUFFIXES

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
}


@dataclass
class Group:
    """The images of one split: files, the class folder of each, and why others were skipped, with counts.

    `other` counts the files that are no images by the endings of their names.
    """

    files: list[Path] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)
    other: Counter = field(default_factory=Counter)


def is_hidden(name: str) -> bool:
    """Names that systems and editors make beside the user's: .ipynb_checkpoints, ._1.jpg, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def read_folders(root: Path) -> tuple[dict[str, Group], str]:
    """The splits of a folder of class folders, and how they were recognised, in words.

    Raises:
        InputError: no class folders, two folders for one split, a split without class folders beside others with them,
            a folder that cannot be listed, or a class whose name is no text.
    """
    tops = [folder for folder in _subfolders(root) if _has_images(folder)]
    if not tops:
        loose = _count_images(root)
        raise InputError(
            f"the folder {str(root)!r} holds no images in sub-folders ({loose} beside each other); allowed: one sub-folder "
            f"of images a class, or parquet files with an image column"
        )
    named = {folder: SPLITS.get(folder.name.lower()) for folder in tops}
    nested = {folder: any(_has_images(below) for below in _subfolders(folder)) for folder in tops}
    if not all(named.values()) or not any(nested.values()):
        group = _classes_of(root, tops)
        if len(tops) == 1 and nested[tops[0]]:
            raise InputError(
                f"the folder {str(root)!r} holds one folder, {tops[0].name!r}, which would be the only class; "
                f"if its sub-folders are the classes or the splits, give {str(tops[0])!r}"
            )
        return {"train": group}, "folders are classes" + _said_of_others([group])
    flat = [folder.name for folder in tops if not nested[folder]]
    if flat:
        other = next(folder.name for folder in tops if nested[folder])
        raise InputError(
            f"in {str(root)!r} the folder {other!r} holds class folders and {flat[0]!r} only images, so that these have no "
            f"labels; move {flat[0]!r} away, or sort its images into class folders"
        )
    groups: dict[str, Group] = {}
    for folder in tops:
        split = named[folder]
        if split in groups:
            both = [other.name for other in tops if named[other] == split]
            raise InputError(
                f"in {str(root)!r} {' and '.join(both)} are both the {split} split; keep or merge them to one"
            )
        groups[split] = _classes_of(folder, _subfolders(folder))
    _count_loose(root, groups.get("train") or next(iter(groups.values())))
    order = sorted(tops, key=lambda folder: ("train", "val", "test").index(named[folder]))
    how = ", ".join(f"{folder.name} is {named[folder]}" for folder in order)
    return groups, f"splits by folder: {how}{_said_of_others(groups.values())}"


def _said_of_others(groups: Iterable[Group]) -> str:
    """Photographs in a format that is not read must not be missed in silence."""
    other = sum((group.other for group in groups), Counter())  # without those that count 0
    endings = ", ".join(sorted(other)[:5])
    return f"; {other.total()} files are no images by their endings ({endings})" if other else ""


def images_below(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Image files at any depth, and whether each is hidden."""
    return ((path, hidden) for path, hidden in _files_below(folder) if path.suffix.lower() in SUFFIXES)


def _files_below(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Files at any depth, and whether each is hidden. Links are followed, a loop of them once."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_cannot_list):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        inside = any(is_hidden(part) for part in Path(place).relative_to(folder).parts)
        yield from ((Path(place, file), inside or is_hidden(file)) for file in files)


def _classes_of(folder: Path, below: list[Path]) -> Group:
    """All images of the class folders `below`, in the order of their paths."""
    group, found = Group(), []
    for label in below:
        count = 0
        for path, hidden in _files_below(label):
            ending = path.suffix.lower()
            if ending not in SUFFIXES:
                group.other[ending or "none"] += 0 if hidden else 1
            elif hidden:
                group.skipped["hidden"] += 1
            else:
                count += 1
                found.append((path.relative_to(folder).as_posix(), path, label.name))
        if count:
            _check_text(label)
    for _, path, label in sorted(found):
        group.files.append(path)
        group.labels.append(label)
    _count_loose(folder, group)
    return group


def _count_loose(folder: Path, group: Group) -> None:
    if loose := _count_images(folder):
        group.skipped["in no class folder"] += loose


def _count_images(folder: Path) -> int:
    return sum(os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file() for entry in os.scandir(folder))


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    except OSError as error:
        _cannot_list(error)
        raise


def _has_images(folder: Path) -> bool:
    return any(not hidden for _, hidden in images_below(folder))


def _check_text(folder: Path) -> None:
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise InputError(f"the folder name {folder.name!a} is not UTF-8; rename it, a class needs a name") from None


def _cannot_list(error: OSError) -> None:
    raise InputError(
        f"the folder {error.filename!r} cannot be listed ({error.strerror}); make it readable or move it away"
    )
