"""The rooms of the package: imports run one way, without a circle, and the public names are a short list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import crossget

ROOT = Path(crossget.__file__).parent
# Each room may import itself and those that it lists. A name that is no folder is a module.
ROOMS: dict[str, set[str]] = {
    "methods": set(),
    "core": {"methods"},
    "measure": {"methods", "core"},
    "checkpoints": {"methods", "core", "integrations"},
    "integrations": {"methods", "core"},
    "demo": {"methods", "core", "measure", "checkpoints", "integrations", "__init__"},
    "cli": {"methods", "core", "measure", "checkpoints", "integrations", "demo", "__init__"},
    "__init__": {"methods", "core", "measure", "checkpoints"},
}
# What an integration may use beside the core, since it is a program of its own that others start.
PROGRAMS = {f"integrations/{name}.py" for name in ("lmms_eval", "lmms_eval_connector", "lmms_eval_llava")}


def modules() -> dict[str, Path]:
    """Name of a module below the package -> its file."""
    files = [
        *ROOT.glob("*.py"),
        *(file for room in ROOMS if (ROOT / room).is_dir() for file in (ROOT / room).glob("*.py")),
    ]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


MODULES = modules()


def imports(file: Path, *, at_import: bool) -> set[str]:
    """The modules of the package that a file imports; `at_import`: when it is imported itself, not later."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    later = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if at_import and node in later:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "crossget":
                continue
            parts = name.split(".")[1:]
            known = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in MODULES]
            packages = [".".join([*parts[:n], "__init__"]) for n in range(len(parts), -1, -1)]
            found.add(known[0] if known else next(one for one in packages if one in MODULES))
    return found


def room_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_run_one_way(module: str) -> None:
    """Also of what is imported later, inside of functions."""
    if f"{module.replace('.', '/')}.py" in PROGRAMS:
        return
    room = room_of(module)
    allowed = {room, *ROOMS[room]}
    strangers = {one for one in imports(MODULES[module], at_import=False) if room_of(one) not in allowed}
    assert not strangers


def test_nothing_imports_in_a_circle() -> None:
    arrows = {module: imports(file, at_import=True) - {module} for module, file in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in arrows[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


def test_what_watches_a_block_knows_nothing_of_the_package() -> None:
    assert imports(MODULES["core.watch"], at_import=False) == set()


def test_the_public_names() -> None:
    assert crossget.__all__ == [
        "Aligned", "Attachment", "AveragePool", "Blocks", "CrossGET", "Determinantal", "Keep", "Linear", "MaxMin",
        "RampedRatio", "Random", "Ratio", "ToMe", "TopK", "Tower", "Ward",
        "attach", "attachment", "benchmark", "count_flops", "doctor", "find_towers", "fit_schedule", "load",
        "load_reference", "register", "unmerge", "unregister",
    ]  # fmt: skip
    assert all(hasattr(crossget, name) for name in crossget.__all__)
