"""The report: one file that refers to nothing outside, with a section for each experiment and the results' numbers."""

import json
import re
import shutil

import pytest

from bench.paper.report import EXPERIMENTS, find_results, main
from bench.paper.sections import SECTIONS
from bench.worker import PROJECT_ROOT

RESULTS = PROJECT_ROOT / "bench" / "results"
pytest.importorskip("matplotlib", reason="plots need the bench extra")


def sections_of(page: str) -> dict[str, str]:
    return dict(re.findall(r'<section id="([\w-]+)">(.*?)</section>', page, flags=re.DOTALL))


def values_of(section: str) -> list[float]:
    return [float(value) for value in re.findall(r'data-value="([^"]+)"', section)]


def test_the_page_is_whole_without_any_other_file(tmp_path):
    output = tmp_path / "report.html"
    assert main(["--results", str(RESULTS), "-o", str(output)]) == 0
    page = output.read_text()
    assert not re.search(r"https?://|<script|<link|<img|url\((?!#)|@import", page)
    assert list(sections_of(page)) == [section.key for section in SECTIONS]


def test_numbers_are_those_of_the_results(tmp_path):
    for name in ("batching.json", "sharing.json"):
        shutil.copy(RESULTS / name, tmp_path)
    output = tmp_path / "report.html"
    assert main(["--results", str(tmp_path), "-o", str(output)]) == 0
    sections = sections_of(output.read_text())
    result = json.loads((tmp_path / "batching.json").read_text())
    for key, name in (("memory", "percent_of_memory_with_tokens"), ("batching", "mean_running")):
        values = values_of(sections[key])
        assert [value for value in values if value in {row[name] for row in result["rows"]}] == [
            row[name] for row in result["rows"]
        ]
        assert result["commit"] in sections[key]
        assert "<svg" in sections[key]
    saved = [row["saved"] for row in json.loads((tmp_path / "sharing.json").read_text())["rows"]]
    assert values_of(sections["sharing"]) == saved
    for section in SECTIONS:
        assert ("Not measured: there is no result" in sections[section.key]) == (
            section.bench not in ("batching", "sharing")
        )


def test_the_file_named_after_an_experiment_comes_first_and_else_the_newest(tmp_path):
    def write(name: str, date: str) -> None:
        (tmp_path / name).write_text(json.dumps({"bench": "paper.rate", "date": date}))

    write("a.json", "2026-01-02")
    write("b.json", "2026-01-01")
    assert find_results(tmp_path)["rate"][0].name == "a.json"
    write("rate.json", "2025-01-01")
    assert find_results(tmp_path)["rate"][0].name == "rate.json"


def test_bad_folders_and_files_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="is not a folder: give one with results"):
        find_results(tmp_path / "none")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is no JSON"):
        find_results(tmp_path)


def test_every_experiment_is_told():
    assert set(EXPERIMENTS) == {"batching", "rate", "sharing", "prefix", "kernel", "block_size", "preemption"}


@pytest.mark.slow
def test_small_runs_of_all_experiments_make_a_page_that_says_they_are_small(tmp_path):
    output = tmp_path / "report.html"
    assert main(["--run", "small", "--results", str(tmp_path / "results"), "-o", str(output)]) == 0
    page = output.read_text()
    assert "No result of" not in page
    assert page.count("A small run") == len(SECTIONS)
    assert all("<svg" in section for section in sections_of(page).values())
