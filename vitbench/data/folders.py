"""Folders of image files: which sub-folders are splits, which are classes, and which files are left out.

The top folders are splits if each of them has a split's name (`SPLITS`, in any case) and holds class folders.
Otherwise each of them is a class. File names decide nothing. A class has the images at any depth below its folder.
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
class ClassFolders:
    """The images of one split.

    Attributes:
        files: the image files.
        labels: the name of each file's class folder.
        skipped: reasons why images are left out, with counts.
        other_files: endings of files that are not images, with counts.
    """

    files: list[Path] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    other_files: Counter[str] = field(default_factory=Counter)


def is_hidden(name: str) -> bool:
    """Whether systems or editors make files of this name, such as .ipynb_checkpoints, ._1.jpg and __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def read_folders(root: Path) -> tuple[dict[str, ClassFolders], str]:
    """The splits of a folder of class folders, and the layout that was recognised, in words.

    Raises:
        InputError: no class folders, two folders for one split, a split without class folders beside splits with them,
            a folder that cannot be listed, or a class name that is not text.
    """
    top_folders = [folder for folder in _subfolders(root) if _has_images(folder)]
    if not top_folders:
        loose_count = _count_images(root)
        raise InputError(
            f"the folder {str(root)!r} holds no images in sub-folders ({loose_count} directly in it); allowed: one "
            f"sub-folder of images for each class, or parquet files with an image column"
        )
    split_of_folder = {folder: SPLITS.get(folder.name.lower(), "") for folder in top_folders}
    nested = {folder: any(_has_images(subfolder) for subfolder in _subfolders(folder)) for folder in top_folders}
    if not all(split_of_folder.values()) or not any(nested.values()):
        group = _classes_of(root, top_folders)
        if len(top_folders) == 1 and nested[top_folders[0]]:
            raise InputError(
                f"the folder {str(root)!r} holds one folder, {top_folders[0].name!r}, which would be the only class; "
                f"if its sub-folders are the classes or the splits, give {str(top_folders[0])!r}"
            )
        return {"train": group}, "folders are classes" + _describe_other_files([group])
    folders_without_classes = [folder.name for folder in top_folders if not nested[folder]]
    if folders_without_classes:
        with_classes, without = (
            next(folder.name for folder in top_folders if nested[folder]),
            folders_without_classes[0],
        )
        raise InputError(
            f"in {str(root)!r} the folder {with_classes!r} holds class folders and {without!r} only images, so these have "
            f"no labels; move {without!r} away, or sort its images into class folders"
        )
    groups: dict[str, ClassFolders] = {}
    for folder in top_folders:
        split = split_of_folder[folder]
        if split in groups:
            both = [top.name for top in top_folders if split_of_folder[top] == split]
            raise InputError(
                f"in {str(root)!r} {' and '.join(both)} are both the {split} split; keep or merge them to one"
            )
        groups[split] = _classes_of(folder, _subfolders(folder))
    _count_loose(root, groups.get("train") or next(iter(groups.values())))
    order = sorted(top_folders, key=lambda folder: ("train", "val", "test").index(split_of_folder[folder]))
    layout = ", ".join(f"{folder.name} is {split_of_folder[folder]}" for folder in order)
    return groups, f"splits by folder: {layout}{_describe_other_files(groups.values())}"


def _describe_other_files(groups: Iterable[ClassFolders]) -> str:
    """A part of the layout's text: how many files are not images, so that photographs of another format are noticed."""
    other_files = sum((group.other_files for group in groups), Counter[str]())  # the sum drops counts of 0
    endings = ", ".join(sorted(other_files)[:5])
    return f"; {other_files.total()} files are no images by their endings ({endings})" if other_files else ""


def find_images(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Image files at any depth, each with whether it is hidden."""
    return ((path, hidden) for path, hidden in _walk_files(folder) if path.suffix.lower() in SUFFIXES)


def _walk_files(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Files at any depth, each with whether it is hidden. Links are followed; each folder is visited once."""
    visited: set[str] = set()
    for folder_path, folders, files in os.walk(folder, followlinks=True, onerror=_cannot_list):
        real_path = os.path.realpath(folder_path)
        if real_path in visited:
            folders.clear()
            continue
        visited.add(real_path)
        folders.sort()
        is_inside_hidden = any(is_hidden(part) for part in Path(folder_path).relative_to(folder).parts)
        yield from ((Path(folder_path, file), is_inside_hidden or is_hidden(file)) for file in files)


def _classes_of(folder: Path, class_folders: list[Path]) -> ClassFolders:
    """All images of the class folders `class_folders`, in the order of their paths."""
    group = ClassFolders()
    entries: list[tuple[str, Path, str]] = []
    for class_folder in class_folders:
        count = 0
        for path, hidden in _walk_files(class_folder):
            ending = path.suffix.lower()
            if ending not in SUFFIXES:
                group.other_files[ending or "none"] += 0 if hidden else 1
            elif hidden:
                group.skipped["hidden"] += 1
            else:
                count += 1
                entries.append((path.relative_to(folder).as_posix(), path, class_folder.name))
        if count:
            _check_text(class_folder)
    for _, path, label in sorted(entries):
        group.files.append(path)
        group.labels.append(label)
    _count_loose(folder, group)
    return group


def _count_loose(folder: Path, group: ClassFolders) -> None:
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
    return any(not hidden for _, hidden in find_images(folder))


def _check_text(folder: Path) -> None:
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise InputError(f"the folder name {folder.name!a} is not UTF-8; rename it, a class needs a name") from None


def _cannot_list(error: OSError) -> None:
    raise InputError(
        f"the folder {error.filename!r} cannot be listed ({error.strerror}); make it readable or move it away"
    )
