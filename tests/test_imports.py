"""Imports point one way: ops -> layers -> models -> generation | training -> cli."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxrec

ROOT = Path(jaxrec.__file__).parent
ARRAYS = {"jax", "numpy", "chex"}
NETWORKS = ARRAYS | {"flax", "optax"}
MODELS = {"ops", "layers", "models"}
# part of jaxrec: (the other parts it may import, the packages it may import; None = any)
MAY_IMPORT: dict[str, tuple[set[str], set[str] | None]] = {
    "errors": (set(), set()),
    "config": (set(), set()),
    "ops": (set(), ARRAYS),
    "layers": ({"ops"}, NETWORKS),
    "models": ({"ops", "layers"}, NETWORKS),
    "generation": (MODELS, NETWORKS),
    "training": (MODELS | {"analysis"}, None),
    "convert": (MODELS, None),
    "analysis": (MODELS, None),
    "testing": (MODELS, None),
    "cli": (MODELS | {"generation", "training", "convert", "analysis", "testing"}, None),
    "__main__": ({"cli"}, set()),
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports, anywhere in it; `from a import b` gives a.b."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return names | {f"{node.module}.{a.name}" for node in froms for a in node.names}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_left(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert part in MAY_IMPORT, f"say in MAY_IMPORT what jaxrec/{part} may import"
    parts, packages = MAY_IMPORT[part]
    names = [name.split(".") for name in imports(path)]
    ours = {
        name[1] for name in names if name[0] == "jaxrec" and name[1:] not in ([], ["__version__"])
    }
    assert ours <= parts | {part, "errors", "config"}
    others = {name[0] for name in names} - {"jaxrec"} - sys.stdlib_module_names
    assert packages is None or others <= packages


def run(code: str, *modules: str) -> None:
    """Runs `code` and then imports modules, in a Python where asking JAX for a device fails."""
    lines = [code, *(f"import {name}" for name in modules)]
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines)],
        env=os.environ | {"JAX_PLATFORMS": "no_such_device"},
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr


def modules(*parts: str) -> list[str]:
    """Import paths of all modules below the given parts of jaxrec."""
    paths = [path.relative_to(ROOT.parent).with_suffix("").parts for path in FILES]
    names = [".".join(path).removesuffix(".__init__") for path in paths]
    return [name for name in names if name.split(".")[1] in parts]


def test_importing_anything_touches_no_device():
    run("", *modules(*MAY_IMPORT.keys() - {"__main__"}))


def test_models_run_where_only_jax_and_flax_are_installed():
    absent = ["grain", "tyro", "orbax", "safetensors", "matplotlib", "tokenizers"]
    hide = f"import sys; sys.modules.update(dict.fromkeys({absent}))"  # None: cannot be imported
    run(hide, *modules("ops", "layers", "models", "generation"))
