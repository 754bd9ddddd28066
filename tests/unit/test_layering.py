"""The rooms and who may know whom: every import of the package, read from the sources, against DESIGN's layering.

It reads sources with ``ast`` and imports nothing of what it checks. The checker is itself tested on planted violations.
Invariant: a new top-level package fails here until it has a place in ``LAYERS``.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From top to bottom. A package imports packages of lower layers. Within a layer, packages joined in one entry may know
# each other; separate entries may not.
LAYERS: tuple[tuple[frozenset[str], ...], ...] = (
    (frozenset({"cli"}),),
    (frozenset({"server"}), frozenset({"validation"}), frozenset({"loadtest"})),
    (frozenset({"engine"}),),
    (frozenset({"runner"}), frozenset({"disagg"})),
    (frozenset({"grammar"}),),
    (frozenset({"models"}),),
    (frozenset({"layers", "quantization", "cache"}),),
    (frozenset({"kernels"}), frozenset({"distributed"})),
    (frozenset({"platforms"}),),
)
# Importable by all; they import nothing of ours but each other.
SHARED = frozenset({"config", "messages", "sampling_params", "utils"})
# Data files with the functions that find them: importable by the layers that load models and questions.
ASSETS_READERS = frozenset({"cli", "server", "validation", "engine"})
# The package's own front door: what ``import argosy`` and ``python -m argosy`` may reach.
FRONT_DOOR = {"": frozenset({"engine"}) | SHARED, "__main__": frozenset({"cli"})}

# The decision-makers: no torch, directly or through anything they import, so that they are tested in microseconds.
PURE_MODULES = (
    "argosy",
    "argosy.config",
    "argosy.messages",
    "argosy.sampling_params",
    "argosy.engine.planned_step",
    "argosy.engine.rank_imports",
    "argosy.engine.request",
    "argosy.engine.scheduler",
    "argosy.engine.waiting_queue",
    "argosy.engine.dp_load_balancer",
    "argosy.engine.replica_client",
    "argosy.engine.replica_loop",
    "argosy.engine.replica_messages",
    "argosy.cache.block_manager",
    "argosy.distributed.layout",
    "argosy.distributed.dp_coord",
    "argosy.distributed.recordings",
    "argosy.engine.deployment_stats",
    "argosy.engine.wire",
    "argosy.server.child_process",
    "argosy.server.engine_messages",
    "argosy.server.engine_pool",
    "argosy.server.engine_process",
    "argosy.server.engine_seat",
    "argosy.server.launch_plan",
    "argosy.server.node",
    "argosy.server.node_process",
    "argosy.server.replica_choice",
    "argosy.server.run",
    "argosy.loadtest.client",
)
PURE_PACKAGES = ("argosy.cli",)  # functions may import torch there; the modules may not

# What only some files may name: dotted name -> path prefixes that may.
RESERVED: Mapping[str, tuple[str, ...]] = {
    "torch.distributed": tuple(
        f"argosy.distributed.{name}" for name in ("communicator", "mesh", "rendezvous", "launcher")
    ),
    "torch.cuda": ("argosy.platforms",),
    "torch.npu": ("argosy.platforms",),
    "torch_npu": ("argosy.kernels", "argosy.platforms"),
    "triton": ("argosy.kernels",),
    "numba": ("argosy.kernels.loops",),
    "transformers": ("argosy.validation",),
    "zmq": ("argosy.engine.wire",),
    "llguidance": ("argosy.grammar",),
    # Code that runs what a file or a peer sends: nowhere.
    "pickle": (),
    "marshal": (),
    "shelve": (),
    "torch.load": (),
    "yaml": (),
}
# Imports inside functions: the command line (a fast start), the front door, and what needs an optional package.
# An engine process says that it lives before it imports torch, and a node's program begins its fork server; who uses no
# grammar does not load llguidance.
LAZY_IMPORTERS = (
    "argosy.cli",
    "argosy.validation",
    "argosy.platforms",
    "argosy.kernels",
    "argosy.grammar",
    "argosy.server.engine_process",
    "argosy.server.node_process",
)
FORBIDDEN_CALLS = ("eval", "exec", "__import__")


@dataclass(frozen=True)
class Import:
    """One imported name. ``is_lazy``: inside a function. Imports under ``TYPE_CHECKING`` count for layers only."""

    name: str
    line: int
    is_lazy: bool
    is_typing_only: bool


def test_package_keeps_its_layers() -> None:
    sources = read_sources(ROOT)
    assert "argosy.config" in sources
    assert check_layers(sources) == []


def test_reserved_names_stay_in_their_rooms() -> None:
    assert check_reserved_names(read_sources(ROOT)) == []


def test_decision_makers_import_no_torch() -> None:
    assert check_purity(read_sources(ROOT)) == []


def test_imports_are_absolute_and_at_the_top() -> None:
    assert check_import_style(read_sources(ROOT)) == []


# --- the checker itself, on planted violations ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("argosy.layers.linear", "from argosy.engine.request import Request", "layers may not import engine"),
        ("argosy.kernels.reference", "import argosy.distributed.layout", "kernels may not import distributed"),
        ("argosy.runner.sampler", "from argosy.disagg import transport", "runner may not import disagg"),
        ("argosy.config", "from argosy.platforms.base import Platform", "config may not import platforms"),
        ("argosy.platforms.cpu", "from argosy.kernels import norm", "platforms may not import kernels"),
        ("argosy.engine.core", "def f():\n    from argosy.cli import main", "engine may not import cli"),
        ("argosy.models.deepseek.mla", "from argosy.assets import x", "models may not import assets"),
        ("argosy.engine.core", "from argosy import LLM", "import from the module that defines it"),
        ("argosy.novelty.thing", "x = 1", "novelty has no place in LAYERS"),
    ],
)
def test_layer_violation_is_found(module: str, source: str, complaint: str) -> None:
    assert complaint in " ".join(check_layers({module: source}))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("argosy.engine.core", "from argosy.runner.model_runner import ModelRunner"),
        ("argosy.layers.linear", "from argosy.quantization.scheme import LinearScheme"),
        ("argosy.cache.block_manager", "from argosy.config import EngineConfig"),
        ("argosy", "from argosy.engine.generation import LLM"),
        ("argosy.engine.build", "from argosy.assets import builtin_model_directory"),
    ],
)
def test_lawful_import_passes(module: str, source: str) -> None:
    assert check_layers({module: source}) == []


@pytest.mark.parametrize(
    ("module", "source", "name"),
    [
        ("argosy.engine.core", "import torch.distributed as dist", "torch.distributed"),
        ("argosy.engine.core", "from torch import distributed", "torch.distributed"),
        ("argosy.layers.linear", "import torch\ntorch.distributed.all_reduce(x)", "torch.distributed"),
        ("argosy.runner.model_runner", "import torch\ntorch.cuda.synchronize()", "torch.cuda"),
        ("argosy.models.deepseek.mla", "import triton.language as tl", "triton"),
        ("argosy.layers.norm", "def f():\n    import torch_npu", "torch_npu"),
        ("argosy.cli.validate", "from transformers import AutoModel", "transformers"),
        ("argosy.quantization.weight_loader", "import torch\nw = torch.load(path)", "torch.load"),
        ("argosy.server.api_server", "import pickle", "pickle"),
        ("argosy.engine.core", "x = eval(text)", "eval"),
    ],
)
def test_reserved_name_is_found(module: str, source: str, name: str) -> None:
    assert name in " ".join(check_reserved_names({module: source}))


def test_reserved_name_is_allowed_at_home() -> None:
    sources = {
        "argosy.platforms.cuda": "import torch\ntorch.cuda.synchronize()",
        "argosy.kernels.triton.x": "import triton",
    }
    assert check_reserved_names(sources) == []


def test_torch_is_found_through_a_chain_of_imports() -> None:
    sources = {
        "argosy": "",
        "argosy.engine.scheduler": "from argosy.cache.block_manager import BlockManager",
        "argosy.cache": "",
        "argosy.cache.block_manager": "from argosy.cache.helper import pad",
        "argosy.cache.helper": "from torch.nn import functional",
    }
    violations = " ".join(check_purity(sources))
    assert "argosy.engine.scheduler -> argosy.cache.block_manager -> argosy.cache.helper" in violations


def test_torch_is_found_in_a_package_that_an_import_passes_through() -> None:
    sources = {"argosy.cache": "import torch", "argosy.cache.block_manager": "x = 1"}
    assert "argosy.cache.block_manager -> argosy.cache" in " ".join(check_purity(sources))


def test_lazy_torch_is_for_the_command_line_only() -> None:
    lazy = "def f():\n    import torch"
    assert check_purity({"argosy.cli.main": lazy}) == []
    assert check_purity({"argosy.engine.scheduler": lazy}) != []
    assert check_purity({"argosy.cli.main": "import torch"}) != []


def test_torch_for_annotations_only_is_no_import() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"
    assert check_purity({"argosy.engine.scheduler": source}) == []


def test_late_and_relative_imports_are_found() -> None:
    assert "inside a function" in check_import_style({"argosy.engine.core": "def f():\n    import json"})[0]
    assert "relative" in check_import_style({"argosy.engine.core": "from .request import Request"})[0]
    assert check_import_style({"argosy.cli.main": "def f():\n    import json"}) == []


# --- the checker ---------------------------------------------------------------------------------------------------


def read_sources(root: Path) -> dict[str, str]:
    """Module name -> source, of every file of the package."""
    sources = {}
    for path in sorted((root / "argosy").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text(encoding="utf-8")
    return sources


def check_layers(sources: Mapping[str, str]) -> list[str]:
    violations = []
    known = SHARED | {"assets"} | set(FRONT_DOOR) | {name for layer in LAYERS for group in layer for name in group}
    for module, source in sources.items():
        importer = _room(module)
        if importer not in known:
            violations.append(f"{module}: {importer} has no place in LAYERS; give it one, with a reason")
            continue
        for item in _imports(source):
            if item.name.split(".")[0] != "argosy":
                continue
            imported = _room(item.name)
            where = f"{module}:{item.line}"
            if imported not in known and importer:
                violations.append(f"{where}: {item.name}: import from the module that defines it, not from argosy")
            elif imported not in _allowed_rooms(importer):
                violations.append(f"{where}: {importer or 'argosy'} may not import {imported} ({item.name})")
    return violations


def check_reserved_names(sources: Mapping[str, str]) -> list[str]:
    violations = []
    for module, source in sources.items():
        for name, line in _mentioned_names(source):
            for reserved, homes in RESERVED.items():
                is_use = name == reserved or name.startswith(f"{reserved}.")
                if is_use and not any(_is_inside(module, home) for home in homes):
                    allowed = ", ".join(homes) or "no file"
                    violations.append(f"{module}:{line}: {name}: only {allowed} may name {reserved}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                violations.append(f"{module}:{node.lineno}: {node.func.id} runs text as code")
    return violations


def check_purity(sources: Mapping[str, str]) -> list[str]:
    violations = []
    for module in sources:
        is_lazy_allowed = any(_is_inside(module, package) for package in PURE_PACKAGES)
        if module not in PURE_MODULES and not is_lazy_allowed:
            continue
        path = _path_to_torch(module, sources, set())
        if path:
            violations.append(f"{' -> '.join(path)} imports torch")
        lazy_torch = [item for item in _imports(sources[module]) if item.is_lazy and _is_inside(item.name, "torch")]
        if lazy_torch and not is_lazy_allowed:
            violations.append(f"{module}:{lazy_torch[0].line}: imports torch inside a function")
    return violations


def check_import_style(sources: Mapping[str, str]) -> list[str]:
    violations = []
    for module, source in sources.items():
        may_be_lazy = module == "argosy" or any(_is_inside(module, package) for package in LAZY_IMPORTERS)
        for item in _imports(source):
            if item.name.startswith("."):
                violations.append(f"{module}:{item.line}: relative import {item.name}")
            elif item.is_lazy and not may_be_lazy:
                violations.append(f"{module}:{item.line}: {item.name} is imported inside a function")
    return violations


def _allowed_rooms(importer: str) -> frozenset[str]:
    if importer in FRONT_DOOR:
        return FRONT_DOOR[importer]
    if importer in SHARED:
        return SHARED
    if importer == "assets":
        return frozenset({"assets"})
    for depth, layer in enumerate(LAYERS):
        for group in layer:
            if importer in group:
                below = {name for lower in LAYERS[depth + 1 :] for other in lower for name in other}
                return group | below | SHARED | ({"assets"} if importer in ASSETS_READERS else set())
    raise AssertionError(f"{importer} is in no layer")


def _path_to_torch(module: str, sources: Mapping[str, str], seen: set[str]) -> list[str]:
    """The chain of modules, importing at the top, from ``module`` to one that imports torch; [] if there is none.

    ``seen`` grows by every module that was looked into, so that each is looked into once.
    """
    top = [item.name for item in _imports(sources[module]) if not item.is_lazy and not item.is_typing_only]
    if any(_is_inside(name, "torch") for name in top):
        return [module]
    seen.add(module)
    parents = [module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)]
    for name in top + parents:
        # ``from package import name`` may name a module or something in the package.
        target = name if name in sources else name.rpartition(".")[0]
        if target in sources and target not in seen:
            path = _path_to_torch(target, sources, seen)
            if path:
                return [module, *path]
    return []


@cache
def _imports(source: str) -> tuple[Import, ...]:
    """Every import, ``from a import b`` as ``a.b``."""
    return tuple(_imports_below(ast.parse(source), is_lazy=False, is_typing_only=False))


def _imports_below(node: ast.AST, *, is_lazy: bool, is_typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, is_lazy, is_typing_only)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                yield Import(
                    f"{'.' * child.level}{child.module or ''}.{alias.name}", child.lineno, is_lazy, is_typing_only
                )
        else:
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            is_guard = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _imports_below(child, is_lazy=is_lazy or is_function, is_typing_only=is_typing_only or is_guard)


def _mentioned_names(source: str) -> Iterator[tuple[str, int]]:
    """Imported names, and dotted names in the code (``torch.cuda.synchronize``), with their lines."""
    for item in _imports(source):
        yield item.name, item.line
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text.replace(".", "").isidentifier():
                yield text, node.lineno


def _room(module: str) -> str:
    """The top-level package or module of ours that ``module`` is in: "" for ``argosy`` itself."""
    return module.split(".")[1] if "." in module else ""


def _is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")
