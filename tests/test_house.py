"""The plan of the house: imports run down its floors, and never in a circle (docs/architecture.md)."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import viscpm_hf


ROOT = Path(viscpm_hf.__file__).parent
FLOORS = {
    "modeling": 1, "tiny": 1, "images": 1, "families": 2, "pipelines": 2, "checkpoints": 3, "loading": 4, "chat": 5,
    "paint": 5, "conversion": 5, "batch": 6, "memory": 6, "evaluation": 7, "serving": 7, "training": 8, "cli": 9,
}  # fmt: skip


def imports() -> dict[str, set[str]]:
    """Every file of the package, `room.file`, and the files that it imports, in functions too."""
    files = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.rglob("*.py")}
    graph = {}
    for name, path in files.items():
        if name.endswith("__init__"):
            continue
        package, found = name.split(".")[:-1], set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
                found |= {".".join(base), *(".".join([*base, alias.name]) for alias in node.names)}
        graph[name] = (found & set(files)) - {name}
    return graph


def test_imports_run_down_the_floors():
    graph = imports()
    rooms = {name.partition(".")[0] for name in graph if "." in name}
    assert rooms <= {*FLOORS, "siblings", "shapes"}, "a new room needs a floor"
    floor = lambda name: FLOORS.get(name.partition(".")[0], 0)  # noqa: E731
    up = [(name, other) for name, others in graph.items() for other in others if 0 < floor(name) < floor(other)]
    assert not up
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {error.args[1]}") from None


def test_files_that_travel_import_their_own_folder_alone():
    for name, others in imports().items():
        if name.startswith("modeling."):
            assert all(other.startswith("modeling.") for other in others), name


def test_files_that_moved_are_found_by_their_old_paths():
    """`viscpm_hf.conversion` held all that reads checkpoints."""
    from viscpm_hf.checkpoints.weight_transforms import KeyMatcher
    from viscpm_hf.conversion import key_maps
    from viscpm_hf.conversion.weight_transforms import KeyMatcher as same

    assert same is KeyMatcher and key_maps.FOLD_WIDTH == "fold_width"
