"""The structure of the package: which part may import which, and the cost of `import hf_mixup`."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import hf_mixup

PACKAGE = Path(hf_mixup.__file__).parent
ROOT = PACKAGE.parent


def rooms(module: str) -> set[str]:
    """`hf_mixup.policies.cutmix` is in the room `policies`, and is `policies.cutmix`."""
    parts = module.split(".")[1:]
    return {".".join(parts[:depth]) for depth in (1, 2) if parts[:depth]}


def drawn() -> dict[str, set[str]]:
    """The arrows of ARCHITECTURE.md: lines `room -> room, room` of its block of imports."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    block = text.split("```imports\n")[1].split("```")[0]
    arrows = {}
    for line in block.splitlines():
        rooms, targets = line.split("->")
        for name in rooms.split(","):
            arrows[name.strip()] = {target.strip() for target in targets.split(",")} - {""}
    return arrows


def imported(tree: ast.Module) -> set[str]:
    """Modules of ours that a module imports, anywhere but for type hints alone."""
    hints = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
        for node in ast.walk(test)
    }
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in hints:
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name.startswith("hf_mixup.")}


def test_imports_follow_the_drawing():
    arrows, missing = drawn(), []
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(["hf_mixup", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        own = rooms(module)
        allowed = own.union(*(arrows.get(room, set()) for room in own))
        missing += [f"{module} imports {name}" for name in imported(ast.parse(path.read_text())) if not rooms(name) & allowed]
    assert not missing, "arrows that ARCHITECTURE.md does not draw: " + "; ".join(sorted(missing))


def test_no_arrow_runs_upwards():
    """Every room is drawn below those that it imports, so there is no circle; and inside, files import each other in no circle."""
    above = []
    for name, targets in drawn().items():
        room = name.split(".")[0]
        assert targets <= {*above, room}, f"{name} imports {sorted(targets - set(above))}, drawn below it"
        above.append(room)
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(["hf_mixup", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        graph[module] = imported(ast.parse(path.read_text())) - {module}
    assert tuple(graphlib.TopologicalSorter(graph).static_order())


def test_import_is_light():
    code = "import sys, hf_mixup; print([m for m in ('torch', 'transformers', 'timm', 'torchvision', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = "import sys; from hf_mixup import METHODS, get_method, blend; print([m for m in ('transformers', 'timm', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented():
    for name in hf_mixup.__all__:
        value = getattr(hf_mixup, name)
        if callable(value):
            assert value.__doc__, name


def test_the_script_is_thin():
    assert len((ROOT / "training_scripts/run_mixup.py").read_text().splitlines()) < 250
