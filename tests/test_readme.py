"""The numbers of README.md are those of lab/results, its flags are the scripts' own."""
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
TEXT = ("pictures, both", "pictures, cycle", "all four - tg", "own words", "both - beam, in")
FIRST = ("pictures, clipscore",)                 # without their intervals


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
