"""The walls of the package: no circles, imports point down, no loose files at its root, no file that nobody can read.

The floors are those of docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ov_kvcrush"

# From the roof down. A room may import from floors below its own, and from itself.
FLOORS = (
    ("bench", "chat", "eval", "server"),
    ("cli",),
    ("__init__",),  # the names that users import
    ("pipelines",),
    ("engine", "genai", "contexts"),
    ("kvcache", "prompts"),
    ("core",),
    ("config",),
    ("model",),
    ("policies",),
    ("native",),
    ("utils",),
    ("errors",),
)
AT_THE_ROOT = {"__init__", "config", "errors"}
MAX_LINES = 400

Imports = dict[str, set[str]]  # module -> modules of the package that it imports


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, str]:
    return {module_of(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(texts: dict[str, str]) -> Imports:
    """Also those inside functions and for types only: they bind two modules as much as the others."""
    found: Imports = {}
    for module, text in texts.items():
        found[module] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.level, f"{module} imports relatively"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found[module] |= {name if name in texts else node.module for name in names}
            elif isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names}
        found[module] &= texts.keys()
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def upward(imports: Imports) -> list[str]:
    """Imports that point to a higher floor, or to another room of the same one."""
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    return [
        f"{importer} -> {imported}"
        for importer, others in imports.items()
        for imported in sorted(others)
        if room_of(importer) != room_of(imported) and floor_of[room_of(importer)] >= floor_of[room_of(imported)]
    ]


def circle(imports: Imports) -> list[str]:
    """Modules that import each other in a ring; empty if there are none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for other in sorted(imports[module]):
                if found := visit(other, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in imports if (found := visit(module, []))), [])


def test_every_room_has_a_floor() -> None:
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert rooms - {"py"} == {room for floor in FLOORS for room in floor}


def test_imports_point_down() -> None:
    assert upward(imports_of(sources())) == []


def test_no_circles() -> None:
    assert circle(imports_of(sources())) == []


def test_no_loose_files_at_the_root() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == AT_THE_ROOT


def test_every_room_says_what_it_is() -> None:
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize("suffix", [".py", ".cpp", ".hpp"])
def test_files_can_be_read(suffix: str) -> None:
    long = {str(p): n for p in PACKAGE.rglob(f"*{suffix}") if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_policies_are_numpy_only() -> None:
    for module, text in sources().items():
        if room_of(module) == "policies":
            assert not re.search(r"^\s*(import|from) openvino", text, re.MULTILINE), module


def test_docs_show_these_floors() -> None:
    """docs/architecture.md has a table of floors, each row its rooms."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    shown = [tuple(re.findall(r"`([\w]+)[/.]?(?:py)?`", row)) for row in rows]
    assert shown[: len(FLOORS)] == [tuple(floor) for floor in FLOORS]


@pytest.mark.parametrize(
    ("texts", "violation"),
    [
        ({"ov_kvcrush.core.a": "from ov_kvcrush.engine.b import x", "ov_kvcrush.engine.b": ""}, "up"),
        ({"ov_kvcrush.engine.a": "from ov_kvcrush.genai import b", "ov_kvcrush.genai.b": ""}, "up"),
        ({"ov_kvcrush.core.a": "def f():\n    import ov_kvcrush.engine.b", "ov_kvcrush.engine.b": ""}, "up"),
        ({"ov_kvcrush.core.a": "import ov_kvcrush.core.b", "ov_kvcrush.core.b": "import ov_kvcrush.core.a"}, "circle"),
        ({"ov_kvcrush.engine.a": "from ov_kvcrush.core.b import x", "ov_kvcrush.core.b": ""}, "none"),
    ],
)
def test_the_walls_hold(texts: dict[str, str], violation: str) -> None:
    imports = imports_of(texts)
    assert ("up" if upward(imports) else "circle" if circle(imports) else "none") == violation
