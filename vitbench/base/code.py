"""Hash the code that a result depends on: a room (a folder of the package) and all rooms that it imports, directly or not.

Imports between rooms are read from the sources (`ast`), including imports inside functions. All files of these rooms are
hashed, so code that only shows a result belongs in another room than code that decides it.
"""

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path


class Sources:
    """The files of a package, read once; later changes of the files have no effect.

    Args:
        root: the package's folder, which has the package's name.
    """

    def __init__(self, root: Path):
        self.package = root.name
        self.texts = {file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(root.rglob("*.py"))}
        self.rooms = {file.partition("/")[0] for file in self.texts if "/" in file}
        self._cache: dict[str, tuple[str, set[str]]] = {}

    def closure(self, *rooms: str) -> list[str]:
        """`rooms` and all rooms that they import, directly or not, sorted.

        Raises:
            KeyError: there is no such room.
        """
        reached, pending = set(), list(rooms)
        while pending:
            room = pending.pop()
            if room not in self.rooms:
                raise KeyError(room)
            if room not in reached:
                reached.add(room)
                pending += {imported for file in self._files(room) for imported in self._parsed_module(file)[1]}
        return sorted(reached)

    def digest(self, *rooms: str) -> str:
        """SHA-256 of the code of the rooms' closure. Comments, docstrings and layout do not change it."""
        return self._digest([file for room in self.closure(*rooms) for file in self._files(room)])

    def digest_all(self) -> str:
        """SHA-256 of the code of all files, as in `digest`."""
        return self._digest(sorted(self.texts))

    def _files(self, room: str) -> list[str]:
        return [file for file in sorted(self.texts) if file.startswith(f"{room}/")]

    def _digest(self, files: list[str]) -> str:
        lines = [f"{file} {self._parsed_module(file)[0]}" for file in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _parsed_module(self, file: str) -> tuple[str, set[str]]:
        """The hash of a file's code, and the rooms that it imports."""
        if file not in self._cache:
            tree = ast.parse(self.texts[file])
            imports = set(self._imports(file, tree))
            for node in ast.walk(tree):
                kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                if isinstance(node, kinds) and ast.get_docstring(node) is not None:
                    node.body = node.body[1:]
            self._cache[file] = hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imports
        return self._cache[file]

    def _imports(self, file: str, tree: ast.Module) -> Iterator[str]:
        """The rooms that `file` imports from."""
        for node in _nodes(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{self._base_module(file, node)}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                package, _, rest = name.partition(".")
                if package == self.package and rest.partition(".")[0] in self.rooms:
                    yield rest.partition(".")[0]

    def _base_module(self, file: str, node: ast.ImportFrom) -> str:
        """The absolute name of the module in a `from ... import`, with leading dots resolved."""
        if not node.level:
            return node.module or ""
        folders = [self.package, *file.split("/")[:-1]]
        folders = folders[: len(folders) - node.level + 1]
        return ".".join([*folders, node.module] if node.module else folders)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those below `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _nodes(node)


PACKAGE_SOURCES = Sources(
    Path(__file__).resolve().parents[1]
)  # read at import: a process keeps the code that it started with


@functools.cache
def code_digest(*rooms: str) -> str:
    """`Sources.digest` of rooms of this package, given by name, such as "training"."""
    return PACKAGE_SOURCES.digest(*rooms)
