"""The numbers of README.md are those of lab/results, its flags are the scripts' own; what the other
pages and the Makefile promise."""
import re

import pytest
from conftest import ROOT

from lab import report

README = (ROOT / "README.md").read_text(encoding="utf-8")
# a line of README, and the claims (lab/claims.json) that stand in it
LINES = {
    "the paper's cycle, by CLIP": ("cycle evaluations", "cycle - beam"),
    "denoising loss, 12 noises": ("denoise evaluations", "denoise - beam"),
    "CLIP of picture and caption (": ("clipscore - beam",),
    "| log-likelihood per token (": ("per token - beam",),
    "both models (`--by both`)": ("denoise evaluations", "both - beam"),
    "| `vitb` |": ("vitb GiB", "vitb seconds"),
    "| `vitb --micro 2` |": ("vitb --micro 2 GiB", "vitb --micro 2 seconds"),
    "| `vitb --checkpointing` |": ("vitb --checkpointing GiB", "vitb --checkpointing seconds"),
    "| `vitl` |": ("vitl GiB", "vitl seconds"),
    "| `blip2` |": ("blip2 GiB", "blip2 seconds"),
}
BY_DOMAIN = {"the paper's cycle, by CLIP": "cycle", "denoising loss, 12 noises": "denoise",
             "CLIP of picture and caption (": "clipscore", "both models (`--by both`)": "both",
             "| log-likelihood per token (": "per token"}
TEXT = ("pictures, both", "pictures, cycle", "texts, both", "texts, both, facts", "all four - tg", "own words", "both - beam, in")
FIRST = ("pictures, clipscore", "texts, clipscore")                 # without their intervals


@pytest.fixture(scope="module")
def claims():
    return report.claims()


@pytest.mark.parametrize("beginning", LINES)
def test_a_table_says_what_was_measured(claims, beginning):
    line = next(line for line in README.splitlines() if beginning in line)
    for name in LINES[beginning]:
        assert claims[name] in line, f"{name} is {claims[name]}"


@pytest.mark.parametrize("beginning", BY_DOMAIN)
def test_a_row_by_domain_says_what_was_measured(claims, beginning):
    line = next(line for line in README.splitlines() if beginning in line)
    cells = [cell.strip() for cell in line.split("|")[4:8]]
    name = BY_DOMAIN[beginning]
    wanted = [claims[f"{name} - beam, {domain}"] for domain in ("in", "near", "out")]
    assert cells == [claim.split(" ")[0] for claim in (*wanted, claims[f"{name} facts"])]


def test_the_text_says_what_was_measured(claims):
    flat = " ".join(README.split())
    for name in TEXT:
        assert claims[name] in flat, f"{name} is {claims[name]}"
    assert f"{claims['A10 seconds']} s a step, {claims['A10 days']} days" in flat
    for name in FIRST:
        assert claims[name].split(" ")[0] in flat, f"{name} is {claims[name]}"


def test_the_page_is_short():
    assert README.count("\n") <= 200


@pytest.mark.parametrize("script", ["rerank", "finetune", "evaluate"])
def test_every_flag_of_the_page_exists(script):
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    for line in re.findall(rf"{script}\.py([^\n#`|]*)", README):
        for flag in re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", line):
            assert f'"{flag}"' in source, f"{script}.py {flag}"


def test_hours_of_coco(claims):
    """Five epochs of 113,287 pictures in batches of 8, at the measured seconds a step."""
    steps = 5 * 113_287 // 8
    hours = {name: round(steps * float(claims[f"{name} seconds"]) / 3600) for name in ("vitb", "vitl", "blip2")}
    flat = " ".join(README.split())
    assert f"COCO ({steps // 100 * 100:,} steps)" in flat
    assert "{vitb} hours with `vitb`, {vitl} `vitl`, {blip2} `blip2`".format(**hours) in flat


def test_the_results_open_with_their_findings():
    """At most ten, each with the command that makes it."""
    page = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    first = page.split("\n## ")[1]
    rows = re.findall(r"^\d+\. .*$", first, re.M)
    assert first.startswith("What was found\n") and 5 <= len(rows) <= 10
    assert all("`python -m lab." in row for row in rows)
    assert page.index(rows[-1]) < 8000


def test_skips_are_told():
    """`make test` and `make test-real` print why a test was skipped: pytest's -r with s."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = [line for line in makefile.splitlines() if "-m pytest" in line]
    assert len(lines) == 2 and all(re.search(r" -r\w*s", line) for line in lines)


def test_the_tests_of_the_table_exist():
    """tests/reported.md: of every row, or it says why there is none."""
    rows = re.findall(r"^\| \d+ \|.*$", (ROOT / "tests/reported.md").read_text(encoding="utf-8"), re.M)
    numbers = [int(row.split()[1]) for row in rows]
    assert numbers == sorted(numbers) and set(numbers) == set(range(1, 37))
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(\w+)`", row)
        assert row.count("::") == len(named) and (named or "no test: " in row), row
        for file, name in named:
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\(", source, re.M), f"{file}::{name}"
