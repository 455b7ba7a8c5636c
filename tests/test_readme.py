"""The README tells the truth: its tables are generated, its links lead somewhere."""

import re
from pathlib import Path

import pytest

from jaxpaged.config import OPTIONS
from jaxpaged.models.registry import support_matrix
from jaxpaged.server.config import OPTIONS as SERVER_OPTIONS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def options_table(options) -> str:
    rows = ["| option | default | meaning |", "|---|---|---|"]
    rows += [f"| `{option.name}` | `{option.default}` | {option.metadata['help']} |" for option in options]
    return "\n".join(rows)


@pytest.mark.parametrize(("name", "options"), [("options", OPTIONS), ("server options", SERVER_OPTIONS)])
def test_the_tables_of_options_are_those_of_the_configs(name, options):
    found = re.search(rf"<!-- {name}: begin -->\n(.*?)\n?<!-- {name}: end -->", README, re.DOTALL)
    assert found is not None
    assert found.group(1) == options_table(options)


def test_the_table_of_models_is_that_of_the_registry():
    found = re.search(r"<!-- models: begin -->\n(.*?)\n?<!-- models: end -->", README, re.DOTALL)
    assert found is not None
    assert found.group(1) == support_matrix()


def test_every_link_to_a_file_leads_to_one():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link


def test_both_commands_are_one_line_each():
    for name in ("generate", "test"):
        block = re.search(rf"<!-- run: {name} -->\n```bash\n(.*?)\n```", README, re.DOTALL)
        assert block is not None
        assert "\n" not in block.group(1)


def example(name: str) -> dict[str, object]:
    """What the example with this marker leaves in its names."""
    block = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)\n```", README, re.DOTALL)
    assert block is not None
    names: dict[str, object] = {}
    exec(compile(block.group(1), name, "exec"), names)
    return names


def test_the_example_of_a_form_runs_and_its_output_has_the_form():
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra: structured)")
    (completion,) = example("structured")["output"].outputs
    assert completion.finish_reason == "stop"
    assert re.fullmatch("(to be|not to be), [a-z]{3,8}[.!]", completion.text)


def test_the_example_of_a_logits_processor_runs_and_no_token_repeats():
    output = example("logits_processors")["output"]
    tokens = output.outputs[0].token_ids
    assert len(tokens) > 4
    assert len(set(tokens)) == len(tokens)
    assert not set(tokens) & set(output.prompt_token_ids)


def test_the_example_of_a_beam_search_runs_and_gives_the_best_first():
    output = example("beams")["output"]
    scores = [hypothesis.score for hypothesis in output.outputs]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
