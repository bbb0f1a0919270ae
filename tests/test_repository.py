"""What must hold for the repository as a whole: names, packages, the direction of imports, documentation."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]

#: Folder of the repository -> the package that it installs as.
PACKAGE_ROOTS = {"qcompile": "qcompile", "passes": "qcompile.passes", "backends": "qcompile.backends"}

FOLDERS = (*PACKAGE_ROOTS, "tests", "examples", "benchmarks", "docs", ".ci")

#: The way of the data, in order; a new reader finds every stage under its name.
STAGES = (
    "passes/capture.py",
    "passes/normalise.py",
    "passes/schemes/",
    "passes/fold.py",
    "passes/convert.py",
    "qcompile/pack.py",
    "qcompile/lower.py",
)

#: All that passes may know of the rest of the library.
KNOWN_TO_PASSES = ("qcompile.passes", "qcompile.errors", "qcompile.modes", "qcompile.policy")

#: All that backends may know of it.
KNOWN_TO_BACKENDS = (*KNOWN_TO_PASSES, "qcompile.backends", "qcompile.version")

HEAVY = frozenset(("tvm", "onnx", "onnxscript", "onnxruntime", "matplotlib", "sklearn", "scipy"))


def files(pattern: str = "*") -> list[Path]:
    """Files of the repository; environments, caches and build results lie elsewhere."""
    found = [path for path in ROOT.glob(pattern) if path.is_file()]
    for folder in FOLDERS:
        found += [
            path
            for path in (ROOT / folder).rglob(pattern)
            if path.is_file() and "__pycache__" not in path.parts
        ]
    return sorted(found)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def installed_package(path: Path) -> str:
    """The package that a Python file belongs to, "" if it is not installed."""
    first, *rest = path.parent.relative_to(ROOT).parts or ("",)
    return ".".join((PACKAGE_ROOTS[first], *rest)) if first in PACKAGE_ROOTS else ""


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything that a file imports, also inside functions and type checking."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                package = installed_package(path).split(".")
                base = [*package[: len(package) - node.level + 1], *base]
            for alias in node.names:
                yield node.lineno, ".".join((*base, alias.name))


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def offending_imports(paths: list[Path], forbidden: Callable[[str], bool]) -> list[str]:
    return [
        f"{relative(path)}:{line} imports {name}"
        for path in paths
        for line, name in imports(path)
        if forbidden(name)
    ]


def test_nothing_imports_the_folders_under_their_own_names() -> None:
    # `import passes` would load a second copy of qcompile.passes, with classes of its own
    assert not offending_imports(
        files("*.py"), lambda name: is_inside(name, "passes") or is_inside(name, "backends")
    )


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_the_way_of_the_data_has_a_file_or_folder_of_its_name(stage: str) -> None:
    path = ROOT / stage
    assert path.is_dir() if stage.endswith("/") else path.is_file()


def test_no_module_is_named_after_nothing() -> None:
    banned = {"util", "utils", "helper", "helpers", "common", "misc"}
    inside = [path.relative_to(ROOT).with_suffix("") for path in files("*.py")]
    assert not [str(path) for path in inside if banned & {part.strip("_") for part in path.parts}]


def test_importing_qcompile_stays_light(tmp_path: Path) -> None:
    code = "import sys, qcompile; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert not HEAVY & set(done.stdout.split())


def exported(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Public functions and classes of the library that a package offers."""
    for name, value in vars(module).items():
        is_ours = str(getattr(value, "__module__", "")).startswith("qcompile")
        if not name.startswith("_") and is_ours and (inspect.isfunction(value) or inspect.isclass(value)):
            yield f"{module.__name__}.{name}", value


def public_methods(cls: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(cls).items():
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            yield name, getattr(cls, name)


@pytest.mark.parametrize("package", ["qcompile", "qcompile.passes"])
def test_public_functions_and_classes_have_docstrings(package: str) -> None:
    bare = []
    for name, value in exported(importlib.import_module(package)):
        if not inspect.getdoc(value):
            bare.append(name)
        if inspect.isclass(value):
            bare += [f"{name}.{method}" for method, one in public_methods(value) if not inspect.getdoc(one)]
    assert not bare


@pytest.mark.parametrize("package", ["qcompile", "qcompile.passes"])
def test_docstrings_of_public_functions_speak_of_their_arguments(package: str) -> None:
    silent = []
    for name, value in exported(importlib.import_module(package)):
        if inspect.isfunction(value):
            document = inspect.getdoc(value) or ""
            unnamed = [
                one for one in inspect.signature(value).parameters if not re.search(rf"\b{one}\b", document)
            ]
            if unnamed and "Args:" not in document:
                silent.append(f"{name}({', '.join(unnamed)})")
    assert not silent


def test_pyproject_lists_the_folders_that_hold_python_files() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    modules = [path for path in files("*.py") if installed_package(path)]
    assert sorted(setuptools["packages"]) == sorted({installed_package(path) for path in modules})
    assert setuptools["package-dir"] == {package: folder for folder, package in PACKAGE_ROOTS.items()}
    assert not [relative(path) for path in modules if not (path.parent / "__init__.py").is_file()]


@pytest.mark.parametrize(
    ("package", "known"), [("qcompile.passes", KNOWN_TO_PASSES), ("qcompile.backends", KNOWN_TO_BACKENDS)]
)
def test_nothing_points_backwards(package: str, known: tuple[str, ...]) -> None:
    def backwards(name: str) -> bool:
        return is_inside(name, "qcompile") and not any(is_inside(name, one) for one in known)

    paths = [path for path in files("*.py") if is_inside(installed_package(path), package)]
    assert paths
    assert not offending_imports(paths, backwards)


def test_targets_are_known_through_the_registry_alone() -> None:
    paths = [path for path in files("*.py") if is_inside(installed_package(path), "qcompile")]
    outside = [path for path in paths if not is_inside(installed_package(path), "qcompile.backends")]
    assert not offending_imports(outside, lambda name: is_inside(name, "qcompile.backends.onnx"))


def test_no_file_holds_a_path_of_one_machine() -> None:
    # put together here, so that this file does not match itself
    machine_path = re.compile(r"(?<![\w./-])" + "/" + r"(?:work|home|root|Users)" + "/")
    found = []
    for path in files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # an image or another binary
        matches = (number for number, line in enumerate(lines, 1) if machine_path.search(line))
        found += [f"{relative(path)}:{number}" for number in matches]
    assert not found


@pytest.mark.parametrize("heading", ["Add a pass", "Add a scheme", "Add a target"])
def test_examples_of_contributing_run(heading: str) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    namespace: dict[str, Any] = {"__name__": "contributing"}
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


@pytest.mark.parametrize("name", ["vertical", "quantizable", "n2uq", "multibranch", "coupled"])
def test_the_page_of_options_lists_every_option_and_its_default(name: str) -> None:
    from qcompile.registry import find_scheme

    config = find_scheme(name).config_type
    page = (ROOT / "docs" / "schemes.md").read_text()
    section = page.split(f"## {name}\n")[1].split("\n## ")[0]
    listed = {row.split("`")[1]: row.split("`")[3] for row in section.splitlines() if row.startswith("| `")}
    defaults = {one.name: ast.literal_eval(listed[one.name]) for one in dataclasses.fields(config)}
    assert config(**defaults) == config()
    assert listed.keys() == defaults.keys()
    assert f"from {config.__module__} import {config.__name__}" in section
