"""Carry components inside a bundle: which modules its configs need, and how a config finds them.

MONAI puts a bundle's folder on the import path when a workflow runs, but not when it is initialised, and
``monai.bundle.load`` only initialises. A packaged config therefore finds its own folder: the workflow that evaluates it
knows where the config file lies.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import trauma_monai

__all__ = ["find_itself", "missing_modules", "outside_packages", "vendor"]

PACKAGE = "trauma_monai"
SOURCE = Path(trauma_monai.__file__).parent

COMPONENT = re.compile(rf"\b{PACKAGE}((?:\.\w+)+)")
"""A component in the text of a config: ``trauma_monai.Name``, or with its module, ``trauma_monai.module.Name``."""

# The innermost ConfigWorkflow on the call stack is the one that evaluates this. Without any (a bare ConfigParser, as
# MONAI Label and MONAI Deploy have it) it is the working directory, as in the bundle's source.
OWN_FOLDER = (
    "$next((str(frame.f_locals['self'].config_root_path.absolute().parent) for frame, _ in traceback.walk_stack(None)"
    " if isinstance(frame.f_locals.get('self'), monai.bundle.ConfigWorkflow)), '.')"
)


def find_itself(config: Mapping[str, Any]) -> dict[str, Any]:
    """Make a config work from any working directory, without this package being installed.

    Args:
        config: content of a workflow's config, or of an overlay on one.

    Returns:
        The config, in which ``bundle_root`` is the folder above that of the config file unless the user sets it, and
        initialising puts that folder on the import path. An overlay that does neither stays as it is.
    """
    found = dict(config)
    if "bundle_root" in config:
        found["bundle_root"] = OWN_FOLDER
    if "initialize" in config:
        found["initialize"] = ["$sys.path.insert(1, @bundle_root)", *config["initialize"]]
    if found != config:
        found = {"imports": ["$import sys", "$import traceback", *config.get("imports", [])]} | {
            name: value for name, value in found.items() if name != "imports"
        }
    return found


def vendor(configs: Iterable[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Copy the modules that configs name, and those that these import, into ``folder/trauma_monai``.

    Returns:
        The copies, sorted.

    Raises:
        ValueError: when a config names a component that this package does not have.
    """
    wanted = _closure(_modules_of(configs), SOURCE)
    if missing := sorted(name for name in wanted if _file_of(name, SOURCE) is None):
        raise ValueError(f"the configs name what this version of {PACKAGE} does not have: {', '.join(missing)}.")
    copies = []
    for file in filter(None, (_file_of(name, SOURCE) for name in sorted(wanted))):
        copy = folder / PACKAGE / file.relative_to(SOURCE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
        copies.append(copy)
    return copies


def missing_modules(configs: Iterable[Mapping[str, Any]], folder: Path) -> list[str]:
    """Name the modules that configs need, directly or by imports, and ``folder/trauma_monai`` lacks."""
    vendored = folder / PACKAGE
    return sorted(name for name in _closure(_modules_of(configs), vendored) if _file_of(name, vendored) is None)


def outside_packages(files: Iterable[Path]) -> set[str]:
    """Name the packages that modules import, this one and the standard library left out."""
    names = {name.partition(".")[0] for file in files for name in _imports(file)}
    return names - set(sys.stdlib_module_names) - {PACKAGE}


def _modules_of(configs: Iterable[Mapping[str, Any]]) -> set[str]:
    """Turn components in the text of configs into dotted names of modules."""
    modules = {PACKAGE}
    for config in configs:
        for path in COMPONENT.findall(json.dumps(config)):
            *parents, name = path[1:].split(".")
            modules.add(f"{PACKAGE}.{'.'.join(parents)}" if parents else _module_of(name))
    return modules


def _module_of(component: str) -> str:
    try:
        return getattr(trauma_monai, component).__module__
    except AttributeError as error:
        raise ValueError(f"a config names trauma_monai.{component}: {error}") from error


def _closure(modules: Iterable[str], root: Path) -> set[str]:
    """Follow imports within the package that lies at ``root``; modules without a file are part of the answer."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if "." in name:
            waiting.append(name.rpartition(".")[0])  # importing a module imports the packages around it
        if (file := _file_of(name, root)) is not None:
            waiting += [module for module in _imports(file) if module.partition(".")[0] == PACKAGE]
    return found


def _imports(file: Path) -> Iterator[str]:
    """List the modules that a file imports, anywhere in it. The package itself imports absolutely only."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _file_of(module: str, root: Path) -> Path | None:
    path = root.joinpath(*module.split(".")[1:])
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)
