"""What code a result depends on: a module, all that it imports, and all that these import.

The imports are read from the sources (`ast`), function-level ones and those of a package that imports every module in its
folder included, so that no list of files is kept by hand. Two rooms are not entered: the package's front door, which
imports nothing until a name is asked for, and `progress`, which shows work and decides nothing.
"""

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

SHOWING = "progress"


class Sources:
    """The modules of a package as they are in its folder now; later changes of the files are not seen.

    Args:
        root: the package's folder, which has the package's name.
    """

    def __init__(self, root: Path):
        self.package, self.texts, self._packages = root.name, {}, set()
        for file in sorted(root.rglob("*.py")):
            parts = (root.name, *file.relative_to(root).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts = parts[:-1]
                self._packages.add(".".join(parts))
            self.texts[".".join(parts)] = file.read_bytes()
        self._known: dict[str, tuple[str, set[str]]] = {}

    def closure(self, *modules: str) -> list[str]:
        """`modules` and all modules of the package that they import, directly or not, sorted.

        Raises:
            KeyError: there is no such module.
        """
        found, todo = set(), list(modules)
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += self._of(name)[1]
        return sorted(found)

    def digest(self, *modules: str) -> str:
        """SHA-256 of what the modules' closure does: comments, docstrings and layout do not change it."""
        return self._digest(self.closure(*modules))

    def whole(self) -> str:
        """The same of every module there is, those that show included."""
        return self._digest(sorted(self.texts))

    def _digest(self, names: list[str]) -> str:
        lines = [f"{name} {self._of(name)[0]}" for name in names]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _of(self, name: str) -> tuple[str, set[str]]:
        """The hash of a module's own code, and the modules of the package that it imports."""
        if name not in self._known:
            tree = ast.parse(self.texts[name])
            imports = self._imports(name, tree)
            for node in ast.walk(tree):
                kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                if isinstance(node, kinds) and ast.get_docstring(node) is not None:
                    node.body = node.body[1:]
            self._known[name] = hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imports
        return self._known[name]

    def _imports(self, name: str, tree: ast.Module) -> set[str]:
        """The modules of the package that `name` imports, and the packages around them, but for what is not entered."""
        found = set()
        for node in _nodes(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found |= self._with_parents(alias.name)
            elif isinstance(node, ast.ImportFrom):
                start = self._start(name, node)
                for alias in node.names:
                    found |= self._with_parents(f"{start}.{alias.name}") or self._with_parents(start)
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "iter_modules":
                inside = f"{name}."
                found |= {each for each in self.texts if each.startswith(inside)}
        return {each for each in found if each != self.package and each.split(".")[1] != SHOWING}

    def _start(self, name: str, node: ast.ImportFrom) -> str:
        """The module that a `from ... import` begins with, dots before it included."""
        if not node.level:
            return node.module or ""
        parts = name.split(".")
        parts = parts[: len(parts) - node.level + (name in self._packages)]
        return ".".join([*parts, node.module] if node.module else parts)

    def _with_parents(self, name: str) -> set[str]:
        """A module of the package and the packages around it, whose `__init__` an import runs; nothing for other names."""
        if name not in self.texts:
            return set()
        parts = name.split(".")
        return {".".join(parts[:count]) for count in range(1, len(parts) + 1)}


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _nodes(node)


OWN = Sources(Path(__file__).resolve().parents[1])  # read at once: a process runs the code that it began with


@functools.cache
def code_digest(*modules: str) -> str:
    """`Sources.digest` of this package's modules, given by name, such as "vitbench.training"."""
    return OWN.digest(*modules)
