"""docs/atlas.md says which file holds each model and what it is made of; this reads the files."""

import ast
import re
from pathlib import Path

import jaxrec

ROOT = Path(jaxrec.__file__).parent
ATLAS = ROOT.parent / "docs" / "atlas.md"
NOT_SYSTEMS = {"models/__init__.py", "models/protocol.py"}


def source(module: str) -> Path:
    """The file of jaxrec.x.y, whether a module or a package."""
    path = ROOT.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def defining_file(module: str, name: str) -> str:
    """Where `from module import name` leads, through any number of packages that pass it on."""
    path = source(module)
    if path.name == "__init__.py":
        if source(f"{module}.{name}").exists():
            return str(source(f"{module}.{name}").relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return defining_file(node.module, alias.name)
    return str(path.relative_to(ROOT))


def ingredients(path: Path) -> set[str]:
    """Files of jaxrec/ops and jaxrec/layers that a model file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("jaxrec.")]
            found |= {str(source(name).relative_to(ROOT)) for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxrec"):
            found |= {defining_file(node.module, alias.name) for alias in node.names}
    return {file for file in found if file.startswith(("ops/", "layers/"))}


def systems() -> dict[str, set[str]]:
    """File or folder of each model -> its ingredients."""
    table = {}
    for path in sorted((ROOT / "models").iterdir()):
        name = str(path.relative_to(ROOT))
        if path.suffix == ".py" and name not in NOT_SYSTEMS:
            table[name] = ingredients(path)
        elif path.is_dir() and any(path.glob("*.py")):
            table[f"{name}/"] = set().union(*map(ingredients, path.rglob("*.py")))
    return table


def test_every_model_has_a_row_that_lists_what_it_imports():
    rows = {}
    for line in ATLAS.read_text().splitlines():
        cells = line.split("|")
        if len(cells) == 5 and (files := re.findall(r"`(models/[^`]+)`", cells[2])):
            rows[files[0]] = set(re.findall(r"`([^`]+)`", cells[3]))
    assert rows == systems()


def test_every_file_that_the_atlas_names_exists():
    named = set(re.findall(r"`((?:ops|layers|models)/[^`]+)`", ATLAS.read_text()))
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_every_op_has_a_row():
    ops = {str(path.relative_to(ROOT)) for path in (ROOT / "ops").rglob("[a-z]*.py")}
    assert ops <= set(re.findall(r"\| `([^`]+)` \|", ATLAS.read_text()))
