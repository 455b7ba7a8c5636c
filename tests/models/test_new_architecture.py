"""What a new architecture costs: the example of the how-to, in lines."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "jaxpaged" / "models" / "README.md").read_text()
OWN_FILES = ("jaxpaged/models/olmo2.py", "converters/olmo2.py")
TABLES = ("jaxpaged/models/registry.py", "converters/architectures.py", "tests/families.py")


def lines_about_olmo2(path: Path) -> int:
    """Lines of imports, entries of dictionaries and elements of tuples that say olmo2."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and "olmo2" in (node.module or ""):
            found.update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and str(key.value).lower().startswith("olmo2"):
                    found.update(range(key.lineno, value.end_lineno + 1))
        elif isinstance(node, ast.Tuple):
            found.update(one.lineno for one in node.elts if isinstance(one, ast.Name) and one.id == "OLMO2")
    return len(found)


def test_a_llama_like_architecture_takes_fewer_than_sixty_lines_and_the_how_to_counts_them_right():
    counts = [len((ROOT / name).read_text().splitlines()) for name in OWN_FILES]
    counts += [lines_about_olmo2(ROOT / name) for name in TABLES]
    assert [int(count) for count in re.findall(r"^\| \[[^]]*\]\([^)]*\) \| (\d+) \|", README, re.MULTILINE)] == counts
    assert f"It is {sum(counts)} lines, blank ones and imports counted" in README
    assert sum(counts) < 60
