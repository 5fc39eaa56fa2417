"""Files are written in one place, `vitbench/base/files.py`, atomically."""

import ast
import errno
import os
from contextlib import nullcontext
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_notebook

from tests.conftest import ROOT
from vitbench.edge.bundle import SHIPPED
from vitbench.rows.runs import Run
from vitbench.run import suite

HOME = ROOT / "vitbench" / "base" / "files.py"
# what writes a file by itself, and so may leave half of one
DIRECT = {
    *("torch.save", "np.save", "np.savez", "np.savez_compressed", "np.savetxt", "onnx.save", "runtime.save_model"),
    *("json.dump", "yaml.dump", "yaml.safe_dump", "pickle.dump", "nbformat.write", "save_file"),
    *("shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree", "shutil.move"),
}
METHODS = {"write_text", "write_bytes", "savefig", "tofile", "touch"}  # of a path, a figure or an array
WITH_PATH = {"to_csv", "to_json", "to_parquet", "to_html"}  # of a table: without a path they give text
OPENING = {"open", "io.open", "gzip.open"}


def direct_writes(tree):
    """The lines of a module where a file is written directly, but for those in a folder that is deleted at once."""
    aside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any("TemporaryDirectory(" in ast.unparse(item) or "atomic_" in ast.unparse(item) for item in node.items)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in aside:
            name, last = ast.unparse(node.func), getattr(node.func, "attr", "")
            words = [*node.args, *(keyword.value for keyword in node.keywords)]
            modes = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            opened = (name in OPENING or last == "open") and any(
                set(mode) <= set("waxrbt+") and set(mode) & set("wax") for mode in modes
            )
            created = name == "os.open" and "O_CREAT" in ast.unparse(node)
            to_stream = name in ("yaml.dump", "yaml.safe_dump") and len(node.args) < 2
            if (
                opened
                or created
                or (name in DIRECT and not to_stream)
                or last in METHODS
                or (last in WITH_PATH and node.args)
            ):
                yield node.lineno


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("open(path, 'w')", True),
        ("open(path, mode='a', encoding='utf-8')", True),
        ("path.open('xb')", True),
        ("Path(path).write_text(text)", True),
        ("figure.savefig(path)", True),
        ("rows.to_csv(path, index=False)", True),
        ("torch.save(state, path)", True),
        ("os.open(path, os.O_WRONLY | os.O_CREAT)", True),
        ("yaml.dump(values, file)", True),
        ("open(path, 'rb')", False),
        ("write_text(path, rows.to_csv(index=False))", False),
        ("yaml.dump(values)", False),
        ("with tempfile.TemporaryDirectory() as folder:\n    onnx.save(graph, folder)", False),
    ],
)
def test_a_direct_write_is_seen(code, found):
    assert bool(list(direct_writes(ast.parse(code)))) == found


def test_no_module_writes_a_file_past_the_one_place():
    alone = set(SHIPPED.values())  # run on a device, where the package is not
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted((ROOT / "vitbench").rglob("*.py"))
        if file != HOME and file not in alone
        for line in direct_writes(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not found, "write with vitbench.base.files, which leaves no half file"


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_full_disk_leaves_no_half_notebook(tmp_path, monkeypatch, room):
    """`room` is how many files can be written: none, the first copy of the running notebook, or all but the last."""
    import papermill
    from papermill.iorw import papermill_io

    usual, left = os.fsync, [room]

    def fsync(number):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(number)

    def execute(_, partial, *__, **___):
        for count in range(2):
            papermill_io.write(nbformat.writes(new_notebook(metadata={"count": count})), partial)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(suite, "_missing_figures_reason", lambda *_: "")
    run, lesson = Run(tmp_path / "run"), SimpleNamespace(name="05", path=tmp_path / "05.ipynb", parameters={})
    kernels = SimpleNamespace(kernel=nullcontext, stopped=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        full = suite._run_one(lesson, "key", {}, run, kernels)
    assert full.status == "failed"
    assert "No space left on device" in full.error
    assert str(run.notebooks / "05") in full.error
    assert [path.name for path in run.notebooks.iterdir()] in ([], ["05.ipynb"])
    assert suite._run_one(lesson, "key", {}, run, kernels).status == "done"
    assert suite._finished_key(run.notebooks / "05.ipynb") == "key"
    assert os.listdir(run.notebooks) == ["05.ipynb"]
