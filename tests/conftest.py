"""Settings every test shares: strict types, CPU, and the shared data where it is present."""

import gc
import importlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import install_import_hook

# array annotations of these packages are checked at every call, shapes and element types included
CHECKED = ("jaxpaged.layers", "jaxpaged.models", "jaxpaged.runner", "pallas_kernels.paged_attention.xla")
install_import_hook(CHECKED, "beartype.beartype")

jax.config.update("jax_numpy_dtype_promotion", "strict")

# engines of equal shapes are made again and again: each shape is compiled once
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# compiled before any test listens to stderr, where it says so; imported behind the hook above
native_library = importlib.import_module("pallas_kernels.native_library")
with warnings.catch_warnings():
    warnings.simplefilter("default")  # of a compiler that fails, which fails the tests that need it
    for kernel in ("paged_attention.native_cpu", "linear.linear"):
        importlib.import_module(f"pallas_kernels.{kernel}").LIBRARY.why_unavailable()

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where no C++ compiler is installed, tests that are parametrized with the compiled kernel are skipped."""
    if native_library.find_compiler() is not None:
        return
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(str(value) == "native_cpu" for value in parameters):
            item.add_marker(pytest.mark.skip(reason="no C++ compiler is installed"))


MOST_MAPPINGS = 20_000
"""Of memory: Linux gives a process 65,530, each compiled program takes some, and the one too many is a crash."""


@pytest.fixture(scope="session")
def drops() -> list[int]:
    """The numbers of mappings at which compiled programs were dropped: what was warm before the last is not now."""
    return []


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped(drops: list[int]) -> Iterator[None]:
    """Between files, where this process holds many: what is needed again comes from the persistent cache."""
    yield
    mappings = Path("/proc/self/maps")
    if not mappings.exists():
        return
    num_mappings = len(mappings.read_text().splitlines())
    if num_mappings > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
        drops.append(num_mappings)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data files that live beside the project; absent for most users."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def stories260k(shared_data: Path) -> Path:
    return shared_data / "stories260k"


@pytest.fixture(scope="session")
def golden_beams(stories260k: Path) -> list[dict[str, Any]]:
    """Beam searches of that model that transformers made."""
    return json.loads((stories260k / "golden.json").read_text())["beams"]


@pytest.fixture(scope="session")
def golden(stories260k: Path) -> list[dict[str, Any]]:
    """Prompts and the tokens that the author's own program gave for them, greedily."""
    return json.loads((stories260k / "golden.json").read_text())["greedy"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The demo model's; a file may have another under this name, as of `model`."""
    return importlib.import_module("harness").demo_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """A tiny random model that writes this tokenizer's tokens, and its config."""
    return importlib.import_module("harness").model_for(tokenizer)
