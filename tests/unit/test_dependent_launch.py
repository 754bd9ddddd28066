"""Kernels that may start while the one before them ends: each waits, in every program, before it touches memory.

Read from the sources, so it needs no Triton and no card; what a race would do, only a card can show.
"""

import ast
from pathlib import Path

import pytest

import argosy

MODULES = sorted((Path(argosy.__file__).parent / "kernels" / "triton").glob("*.py"))
CONSTANTS = {"weight", "correction_bias"}  # pointers to what no kernel writes while others run
ACCESSES = {"load", "store", "gather", "scatter"}


def find_origin(tree: ast.Module, name: str) -> Path | None:
    """Of a kernel that another module defines."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return next(path for path in MODULES if path.stem == (node.module or "").rpartition(".")[2])
    return None


def find_functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def find_launched(tree: ast.Module) -> set[str]:
    """Kernels launched with ``launch_pdl``, which may stand in a dictionary of options."""
    launched = set()
    for function in find_functions(tree).values():
        if "launch_pdl" not in ast.dump(function):
            continue
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        launches = [call for call in calls if isinstance(call.func, ast.Subscript)]
        for launch in launches:
            names = {keyword.arg for keyword in launch.keywords}
            if "launch_pdl" in names or None in names:
                launched.add(ast.unparse(launch.func.value))  # type: ignore[attr-defined]
    return launched


def is_call_of(statement: ast.stmt, name: str) -> bool:
    return isinstance(statement, ast.Expr) and ast.unparse(statement.value) == f"{name}()"


def find_early_accesses(statements: list[ast.stmt]) -> set[str]:
    """What is read or written, but for constants, and early returns."""
    found = set()
    for node in (node for statement in statements for node in ast.walk(statement)):
        if isinstance(node, ast.Return):
            found.add("return")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_access = node.func.attr in ACCESSES or node.func.attr.startswith(("atomic", "warp_specialize"))
            is_library = ast.unparse(node.func.value) in {"tl", "gl"}
            pointer = node.args[0] if is_library and node.args else node.func.value
            names = {name.id for name in ast.walk(pointer) if isinstance(name, ast.Name)}
            if is_access and not names & CONSTANTS:
                found.add(ast.unparse(node))
    return found


LAUNCHED = [
    (path.stem, name) for path in MODULES for name in sorted(find_launched(ast.parse(path.read_text(encoding="utf-8"))))
]


@pytest.mark.parametrize(("module", "name"), LAUNCHED)
def test_kernel_waits_before_it_touches_memory(module: str, name: str) -> None:
    tree = ast.parse(next(path for path in MODULES if path.stem == module).read_text(encoding="utf-8"))
    origin = find_origin(tree, name)
    functions = find_functions(ast.parse(origin.read_text(encoding="utf-8")) if origin else tree)
    body = functions[name].body
    waits = [i for i, statement in enumerate(body) if is_call_of(statement, "wait_for_inputs")]
    assert len(waits) == 1, "wait_for_inputs() must stand once in the kernel's body, in no branch"
    assert not find_early_accesses(body[: waits[0]])


def test_what_is_held_to_it_is_found() -> None:
    assert {
        ("norms", "_rms_norm_kernel"),
        ("linear_fp32", "_linear_kernel"),
        ("linear_fp32", "_few_tokens_kernel"),
        ("route", "_route_kernel"),
        ("index_scores", "_score_keys_kernel"),
        ("w8a8_gemm", "multiply_on_hopper"),
    } <= {*LAUNCHED}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = tl.load(weight + places)", set()),
        ("fetch_lines(weight + places)", set()),
        ("if row >= num_rows:\n    return", {"return"}),
        ("x = tl.load(rows + places)", {"tl.load(rows + places)"}),
        ("tl.store(out, 0)", {"tl.store(out, 0)"}),
        ("x = x_tiles.load([0, k])", {"x_tiles.load([0, k])"}),
        ("tl.atomic_add(counts, 1)", {"tl.atomic_add(counts, 1)"}),
        ("gl.load(counts)", {"gl.load(counts)"}),
        ("gl.warp_specialize([(copy, (rows,))], [1], [24])", {"gl.warp_specialize([(copy, (rows,))], [1], [24])"}),
    ],
)
def test_early_accesses_are_found(source: str, expected: set[str]) -> None:
    assert find_early_accesses(ast.parse(source).body) == expected
