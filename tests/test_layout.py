"""How the code is laid out: which way imports run, and that files stay readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flexavatar_jax", "kernels", "data_pipelines", "configs")

KNOWS = {
    "kernels": {"kernels"},
    "data_pipelines": {"data_pipelines"},
    "configs": {"configs"},
    "flexavatar_jax.model": {"kernels", "data_pipelines.frame", "flexavatar_jax.model"},
    "flexavatar_jax.frozen": {
        "kernels",
        "data_pipelines.errors",
        "flexavatar_jax.frozen",
        "flexavatar_jax.model.attention_gpu",
        "flexavatar_jax.model.attention_kernels",
        "flexavatar_jax.model.attention_tpu",
    },
}
"""What these may import of the project; everything else may import whatever makes no circle."""


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, *, top_level: bool = False) -> set[str]:
    """The project's modules that a module imports; `top_level`: those it needs to be imported."""
    tree = ast.parse(MODULES[name].read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {
                inner if (inner := f"{node.module}.{alias.name}") in MODULES else node.module
                for alias in node.names
            }
    return {module for module in found if module in MODULES}


@pytest.mark.parametrize("room", KNOWS)
def test_a_room_knows_only_what_lies_beneath_it(room):
    strangers = {
        f"{name} imports {other}"
        for name in MODULES
        if name == room or name.startswith(f"{room}.")
        for other in imports(name)
        if not any(other == known or other.startswith(f"{known}.") for known in KNOWS[room])
    }
    assert not strangers


def test_no_import_runs_in_a_circle():
    left = {name: imports(name, top_level=True) - {name} for name in MODULES}
    # A package's __init__ gathers what its modules define; importing one of them runs it first.
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_no_file_is_longer_than_a_reader_can_hold():
    tests = (ROOT / "tests").rglob("*.py")
    lengths = {
        str(path.relative_to(ROOT)): path.read_text().count("\n")
        for path in (*MODULES.values(), *tests)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 350} == {}


def test_every_module_says_what_it_is_for():
    assert not [
        name for name, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))
    ]
