"""The import contract: who may import whom, and where imports may stand."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jaxpaged", "pallas_kernels", "converters", "bench")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
FLOORS = (  # a room, its floor; the longest prefix counts
    ("pallas_kernels", 1),
    ("jaxpaged.sharding", 1),
    ("jaxpaged.config", 1),
    ("jaxpaged.sampling_params", 1),
    ("jaxpaged.structured_outputs", 1),
    ("jaxpaged.refusals", 1),
    ("jaxpaged.interrupts", 1),
    ("jaxpaged.layers", 2),
    ("jaxpaged.core", 2),
    ("jaxpaged.models", 3),
    ("jaxpaged.runner", 4),
    ("jaxpaged.engine", 5),
    ("converters", 5),
    ("jaxpaged.llm", 6),
    ("jaxpaged.server", 6),
    ("jaxpaged.cli", 7),
    ("jaxpaged.commands", 7),
    ("bench", 7),
    ("jaxpaged", 8),
)
HOST_WING = (
    "jaxpaged.core", "jaxpaged.config", "jaxpaged.sampling_params", "jaxpaged.structured_outputs", "jaxpaged.refusals",
)
LAZY = {  # function bodies that may import, and what: optional extras, slow imports (a verb, Pallas), tokenizers
    "jaxpaged.__main__": {"jaxpaged"},
    "jaxpaged.engine.tokenizer": {"transformers"},
    "converters.orbax_library": {"orbax"},
    "jaxpaged.engine.grammars": {"llguidance"},
    "pallas_kernels.paged_attention.api": {"pallas_kernels"},
    "bench": None,
}


def floor(module: str) -> int:
    return max((len(room), number) for room, number in FLOORS if module == room or module.startswith(room + "."))[1]


def imports_of(name: str) -> list[tuple[str, bool]]:
    """(module, whether the import stands in a function or under a condition) for each import of a file."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, is_inner: bool) -> None:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            assert node.module is not None
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                found.append((node.module, is_inner))  # of a package too: it is run first
                if longer in FILES:
                    found.append((longer, is_inner))
        elif isinstance(node, ast.Import):
            found.extend((alias.name, is_inner) for alias in node.names)
        inner = is_inner or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.If, ast.Try))
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(FILES[name].read_text()), False)
    return found


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_down_only(name: str) -> None:
    for module, _ in imports_of(name):
        if module in FILES and not name.startswith("bench"):
            assert floor(module) <= floor(name), f"{name} imports {module}, which stands above it"


@pytest.mark.parametrize("name", sorted(n for n in FILES if n.startswith("pallas_kernels")))
def test_kernels_know_arrays_only(name: str) -> None:
    for module, _ in imports_of(name):
        root = module.split(".")[0]
        assert root in {"jax", "jaxlib", "numpy", "jaxtyping", "pallas_kernels"} | sys.stdlib_module_names, (
            f"{name} imports {module}"
        )


@pytest.mark.parametrize("name", sorted(n for n in FILES if n.startswith(HOST_WING)))
def test_the_host_wing_is_plain_python(name: str) -> None:
    for module, _ in imports_of(name):
        is_standard = module.split(".")[0] in sys.stdlib_module_names
        is_own = module.startswith(HOST_WING)
        assert is_standard or is_own, f"{name} imports {module}"


@pytest.mark.parametrize("name", sorted(n for n in FILES if n.startswith(("jaxpaged.layers", "jaxpaged.models"))))
def test_the_device_wing_knows_no_scheduling(name: str) -> None:
    for module, _ in imports_of(name):
        assert not module.startswith(("jaxpaged.core", "jaxpaged.runner", "jaxpaged.engine", "converters")), (
            f"{name} imports {module}"
        )


def test_kernels_are_imported_in_few_places() -> None:
    layers = tuple(f"jaxpaged.layers.{name}" for name in ("attention", "embedding", "linear", "moe"))
    allowed = (*layers, "jaxpaged.runner", "jaxpaged.commands.info", "bench", "pallas_kernels")
    for name in FILES:
        if not name.startswith(allowed):
            for module, _ in imports_of(name):
                assert not module.startswith("pallas_kernels"), f"{name} imports {module}"


def test_nothing_below_floor_six_imports_converters() -> None:
    for name in FILES:
        if floor(name) < 6 and not name.startswith("converters"):
            assert not any(module.startswith("converters") for module, _ in imports_of(name)), name


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_stand_at_the_top(name: str) -> None:
    for module, is_inner in imports_of(name):
        if not is_inner:
            continue
        allowed = next((LAZY[key] for key in LAZY if name == key or name.startswith(key + ".")), set())
        assert allowed is None or module.split(".")[0] in allowed, f"{name} imports {module} inside a body"


def test_no_torch_and_no_remote_code() -> None:
    for name in FILES:
        if not name.startswith("bench"):
            for module, _ in imports_of(name):
                assert module.split(".")[0] != "torch", f"{name} imports torch"


def test_there_is_no_import_cycle() -> None:
    graph = {name: {m for m, _ in imports_of(name) if m in FILES and m != name} for name in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name):], name))
        if name not in done:
            for module in sorted(graph[name]):
                visit(module, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_room_has_its_card() -> None:
    for name, path in FILES.items():
        if path.name == "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert "May import" in text, f"{name} has no room card"
            assert "Must never come in" in text, f"{name} has no room card"
            assert "Read first" in text, f"{name} has no room card"
