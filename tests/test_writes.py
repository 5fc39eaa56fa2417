"""Files are written in one place, `vitbench/base/files.py`: whole or not at all."""

import ast

import pytest

from tests.conftest import ROOT
from vitbench.edge.bundle import SHIPPED

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
