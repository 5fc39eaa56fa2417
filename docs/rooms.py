"""Draw the rooms of the package, its top-level folders, and the imports between them into docs/DESIGN.md.

`python docs/rooms.py` writes the picture; with `--check` it writes nothing and exits with 1 if the picture is outdated.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).resolve().with_name("DESIGN.md")
PACKAGE = PAGE.parents[1] / "vitbench"
START, END = "<!-- rooms: start -->", "<!-- rooms: end -->"
LOOSE = "loose"  # the room of modules that lie in no folder
FRONT = ("__init__", "__main__", "version")  # the package's entry points belong to no room


def room(package: Path, parts: list[str]) -> str:
    """The room of a dotted name below the package, "" for an entry point or a name that is no module."""
    if not parts or parts[0] in FRONT:
        return ""
    if (package / parts[0]).is_dir():
        return parts[0]
    return LOOSE if (package / f"{parts[0]}.py").is_file() else ""


def imports(tree: ast.AST, inside: list[str]) -> Iterator[list[str]]:
    """The dotted names that a module of the package `inside` imports, without those under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = inside[: len(inside) - node.level + 1] if node.level else []
            base = [*parent, *(node.module.split(".") if node.module else [])]
            yield from ([*base, alias.name] for alias in node.names)
        yield from imports(node, inside)


def graph(package: Path) -> dict[str, set[str]]:
    """Room -> the rooms that its files import."""
    arrows: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        parts = list(file.relative_to(package).with_suffix("").parts)
        if start := room(package, parts):
            tree, inside = ast.parse(file.read_text(encoding="utf-8")), [package.name, *parts[:-1]]
            names = [name[1:] for name in imports(tree, inside) if name[0] == package.name]
            arrows.setdefault(start, set()).update({room(package, name) for name in names} - {"", start})
    return arrows


def reached(arrows: dict[str, set[str]], start: str) -> set[str]:
    """The rooms that a path of arrows reaches."""
    rooms, pending = set(), [start]
    while pending:
        new = arrows.get(pending.pop(), set()) - rooms
        rooms |= new
        pending += new
    return rooms


def reduced(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The transitive reduction: without each arrow that a longer path makes superfluous."""
    arrows = {start: set(targets) for start, targets in arrows.items()}
    for start, target in sorted((start, target) for start, targets in arrows.items() for target in targets):
        arrows[start].remove(target)
        if target not in reached(arrows, start):
            arrows[start].add(target)
    return arrows


def main(arguments: list[str], page: Path = PAGE, package: Path = PACKAGE) -> int:
    """Write the picture, a Mermaid flowchart, between the page's markers, or with --check compare it."""
    arrows = reduced(graph(package))
    lines = [
        *sorted(arrows),
        *(f"{start} --> {target}" for start in sorted(arrows) for target in sorted(arrows[start])),
    ]
    picture = "\n".join(["```mermaid", "flowchart TD", *(f"    {line}" for line in lines), "```"])
    text = page.read_text(encoding="utf-8")
    new = f"{text.partition(START)[0]}{START}\n{picture}\n{END}{text.partition(END)[2]}"
    if "--check" in arguments and new != text:
        print(f"{page.name} is not up to date; run python docs/rooms.py", file=sys.stderr)
    elif new != text:
        page.write_text(new, encoding="utf-8")
    return int("--check" in arguments and new != text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
