"""What may lie where a folder is written, what is left when writing fails, and who may read what was written."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import ROOT
from vitbench import cli
from vitbench.base import store
from vitbench.base.errors import InputError
from vitbench.base.files import (
    TEMPORARY_NAME,
    FolderKind,
    append_bytes,
    atomic_file,
    atomic_folder,
    check_target,
    drop_partial_line,
    write_array,
    write_bytes,
    write_tensors,
    write_text,
)
from vitbench.edge import bundle
from vitbench.figures.gallery import draw
from vitbench.figures.report import write_report
from vitbench.model import artifact, vit
from vitbench.rows.runs import Run

BOX = FolderKind("a box", "box.json", frozenset({"box"}), lambda content: content["box"])


@pytest.fixture(scope="module")
def tiny():
    return vit.create_model("vit_micro_patch2_8", num_classes=4)


def contents(folder):
    """Every file below a folder and what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(path, kind=BOX, *, names=("a",), text="one"):
    with atomic_folder(path, kind) as folder:
        for name in names:
            write_text(folder / name, text)
        write_text(folder / "box.json", json.dumps({"box": names}))


def saved(path, model):
    artifact.save(model, path)


SITUATIONS = {
    "a thesis": lambda place: write_text(place / "thesis.tex", "years"),
    "a hidden file": lambda place: write_text(place / ".keep", ""),
    "an empty folder": lambda place: (place / "photographs").mkdir(),
    "rows": lambda place: write_text(place / "records.jsonl", "{}\n"),
    "somebody's own recipe": lambda place: write_text(place / "recipe.json", '{"flour": 500}'),
    "a recipe that is no object": lambda place: write_text(place / "recipe.json", "[1]"),
    "a bundle": lambda place: write_text(
        place / "bundle.json", json.dumps({"schema_version": 1, "id": "", "models": [], "files": {}})
    ),
    "a file": None,
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("command", ["compress", "combine", "bundle"])
def test_a_command_leaves_what_it_did_not_write_and_says_so_before_any_work(
    tmp_path, capsys, tiny, monkeypatch, command, situation
):
    place, model = tmp_path / "place", artifact.save(tiny, tmp_path / "model")
    if SITUATIONS[situation]:
        place.mkdir()
        SITUATIONS[situation](place)
    else:
        write_text(place, "mine")
    if command == "bundle" and situation == "a bundle":
        write_text(place / "answers.json", "{}")  # a measured one
    before = contents(tmp_path)
    for name in ("load", "save"):
        monkeypatch.setattr(artifact, name, lambda *_: pytest.fail("work was done before the folder was refused"))
    words = {
        "compress": [],
        "combine": ["--dataset", "digits", "--budget", "bytes=0.5", "--record", str(tmp_path / "r")],
    }
    assert cli.main([command, str(model), *words.get(command, []), "--out", str(place)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert str(place) in said[0]
    assert "give a" in said[0]
    assert contents(tmp_path) == before


def test_the_function_itself_refuses_too(tmp_path, tiny):
    model = artifact.save(tiny, tmp_path / "model")
    write_text(tmp_path / "notes.txt", "mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="'model' and 1 more and is not a saved model"):
        artifact.save(tiny, tmp_path)
    with pytest.raises(InputError, match="is not a bundle, so it is left alone"):
        bundle.make_bundle([model], model)
    write_text(model / "notes.txt", "mine")
    with pytest.raises(InputError, match="a saved model and beside it 'notes.txt', which would be lost"):
        artifact.save(tiny, model)
    (model / "notes.txt").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["notebooks", "figures", "report.html", "recipe.json"])
def test_results_go_into_no_folder_where_they_would_write_over_something(tmp_path, name):
    write_text(tmp_path / "thesis.tex", "mine")
    Run(tmp_path)  # rows beside it take nothing away
    for folder in ("theirs", "ours"):
        (tmp_path / folder / name).mkdir(parents=True)
    write_text(tmp_path / "ours" / "records.jsonl", "")
    with pytest.raises(InputError, match=f"holds '{name}' and no results"):
        Run(tmp_path / "theirs")
    assert os.listdir(tmp_path / "theirs") == [name]
    Run(tmp_path / "ours")


def test_a_page_and_a_table_that_are_not_ours_stay(tmp_path):
    for name, work in {
        "report.html": lambda: write_report(tmp_path),
        "size.csv": lambda: draw("size", pd.DataFrame(), tmp_path / "size.png"),
    }.items():
        write_text(tmp_path / name, "<title>my page</title>")
        with pytest.raises(InputError, match=name):
            work()
        assert (tmp_path / name).read_text() == "<title>my page</title>"
    write_text(tmp_path / "report.html", "<title>vitbench: an earlier report</title>")
    with pytest.raises(InputError, match="no records"):
        write_report(tmp_path)


def test_a_folder_of_the_same_kind_is_replaced_and_a_model_by_itself(tmp_path, tiny):
    path = tmp_path / "model"
    for place in (path, tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        first = contents(artifact.save(tiny, place))
        assert contents(artifact.save(artifact.load(place), place)) == first
    other = vit.create_model("vit_micro_patch2_8", num_classes=4, seed=1)
    assert contents(artifact.save(other, path))["model.safetensors"] != first["model.safetensors"]
    assert torch.equal(artifact.load(path).head.weight, other.head.weight)
    assert sorted(os.listdir(tmp_path)) == ["empty", "model"]


def test_files_that_the_new_folder_lacks_are_taken_out_and_no_others(tmp_path):
    fill(tmp_path / "box", names=("a", "b"))
    fill(tmp_path / "box", names=("c",))
    assert sorted(os.listdir(tmp_path / "box")) == ["box.json", "c"]
    write_text(tmp_path / "mine", "mine")
    write_text(tmp_path / "box" / "box.json", '{"box": ["c", "../mine"]}')
    fill(tmp_path / "box")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("place", ["absent", "empty", "same"])
def test_a_block_that_fails_changes_nothing(tmp_path, place):
    target = tmp_path / "box"
    if place == "empty":
        target.mkdir()
    if place == "same":
        fill(target)
    before, there = contents(tmp_path), target.exists()

    def work():
        with atomic_folder(target, BOX) as folder:
            write_text(folder / "a", "two")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert contents(tmp_path) == before
    assert target.exists() == there
    assert not [path for path in tmp_path.rglob("*") if TEMPORARY_NAME.fullmatch(path.name)]


def test_what_a_killed_process_left_in_a_folder_is_no_strangers(tmp_path):
    target = tmp_path / "box"
    fill(target)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    young = target / f".vitbench.{ended.pid}.0123abcd.part"
    young.mkdir()
    (young / "a").write_text("half")
    fill(target, text="two")
    assert sorted(os.listdir(target)) == [young.name, "a", "box.json"]


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_a_killed_process_left_is_removed_when_it_is_old(tmp_path, is_folder):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {f".vitbench.{pid}.0123abcd.part": pid for pid in (ended.pid, os.getpid())}
    for name in names:
        (tmp_path / name).mkdir() if is_folder else (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".vitbench.part").write_text("a user's")
    write_text(tmp_path / "a", "whole")
    running = f".vitbench.{os.getpid()}.0123abcd.part"
    assert sorted(os.listdir(tmp_path)) == sorted([running, ".vitbench.part", "a"])


def test_a_link_is_written_through_and_the_current_folder_stays(tmp_path, tiny, monkeypatch):
    for name in ("far", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("far")
    (tmp_path / "dangling").symlink_to("new")
    for name, real in (("link", "far"), ("dangling", "new")):
        for _ in range(2):
            artifact.save(tiny, tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert sorted(os.listdir(tmp_path / real)) == ["model.safetensors", "recipe.json"]
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(2):
        artifact.save(tiny, ".")
        assert sorted(os.listdir(".")) == ["model.safetensors", "recipe.json"]
        assert os.stat(".").st_nlink  # a folder that was taken away has none


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_modes_follow_the_umask(tmp_path, tiny, umask):
    before = os.umask(umask)
    try:
        path = artifact.save(tiny, tmp_path / "new" / "model")
        (tmp_path / "there").mkdir()
        artifact.save(tiny, tmp_path / "there")
        append_bytes(tmp_path / "lines", b"one\n")
        write_array(tmp_path / "array.npy", np.zeros(2))
    finally:
        os.umask(before)
    for file in (
        path,
        path.parent,
        *path.iterdir(),
        *(tmp_path / "there").iterdir(),
        tmp_path / "lines",
        tmp_path / "array.npy",
    ):
        wanted = (0o777 if file.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(file.stat().st_mode) == wanted, file


WRITERS = {
    "text": lambda path: write_text(path, "x" * 100_000),
    "bytes": lambda path: write_bytes(path, bytes(100_000)),
    "tensors": lambda path: write_tensors(path, {"x": torch.zeros(50_000)}),
    "array": lambda path: write_array(path, np.zeros(50_000)),
    "tree": lambda path: store.write_tree(path, {"x": [torch.zeros(50_000)]}),
    "lines": lambda path: append_bytes(path, bytes(100_000)),
}
SMALL = """
import resource, signal, sys
from tests.base.test_files import WRITERS
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
for name, write in WRITERS.items():
    try:
        write(f"{sys.argv[1]}/{name}")
        print(name, "was written")
    except OSError as error:
        print(name, error.errno, error.filename)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="files are limited in size as Linux does it")
def test_a_writer_that_gets_no_space_names_its_file_and_leaves_what_was_there(tmp_path):
    for name in WRITERS:
        write_text(tmp_path / name, "before\n")
    done = subprocess.run(
        [sys.executable, "-c", SMALL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"{name} {errno.EFBIG} {tmp_path / name}" for name in WRITERS]
    assert contents(tmp_path) == dict.fromkeys(WRITERS, b"before\n")
    for name, write in WRITERS.items():  # and with space they go on
        write(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 90_000, name


def test_a_file_beside_a_link_or_with_the_longest_name(tmp_path):
    write_text(tmp_path / "far", "one")
    (tmp_path / "link").symlink_to("far")
    write_text(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far").read_text() == "two"
    write_text(tmp_path / ("x" * 255), "long")
    with pytest.raises(IsADirectoryError), atomic_file(tmp_path) as file:
        file.write(b"x")
    assert sorted(os.listdir(tmp_path)) == ["far", "link", "x" * 255]


@pytest.mark.parametrize(("text", "left", "whole"), [(b"a\nb", b"b", b"a\n"), (b"a\n", b"", b"a\n"), (b"a", b"a", b"")])
def test_a_torn_last_line_is_taken_out(tmp_path, text, left, whole):
    write_bytes(tmp_path / "lines", text)
    assert drop_partial_line(tmp_path / "lines") == left
    assert (tmp_path / "lines").read_bytes() == whole
    assert drop_partial_line(tmp_path / "none") == b""


def test_a_target_that_cannot_be(tmp_path):
    write_text(tmp_path / "file", "")
    with pytest.raises(InputError, match="cannot be written .*own"):
        check_target(tmp_path / "file" / "model", BOX)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="is a file|cannot be written"):
        check_target(tmp_path / "loop", BOX)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]
    check_target(tmp_path / "a" / "b" / "c", BOX)
    assert not (tmp_path / "a").exists(), Path
