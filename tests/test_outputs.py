"""outputs.py: the table, the winners, pairs, and what a choice is worth, read back by others."""
import csv

import datasets
from PIL import Image

import best_of_n
import metrics
import outputs


def candidates(scores, key="caption", direction="image-text-image"):
    return {"x": [{"item": "x", "direction": direction, "input": "tests/x.png", "caption": "a ring",
                   "scores": {"clip": s}} | {key: name} for name, s in scores]}


def test_preference_pairs_of_captions_load_as_trl_wants_them(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    scores = [("a", .5), ("b", .9), ("a", .5), ("c", .52), ("d", None)]
    groups = candidates(scores)
    for r in groups["x"]:
        r["input"] = str(tmp_path / "x.png")
    said = outputs.write_pairs(groups, "clip", .05, tmp_path)
    text = (tmp_path / "pairs.jsonl").read_text()
    assert said.startswith("2 preference pairs") and "1 ties" in said          # c - a is a tie
    assert said.endswith("1 candidates equal to another one, 1 without a score")
    outputs.write_pairs({"x": groups["x"][::-1]}, "clip", .05, tmp_path)
    assert (tmp_path / "pairs.jsonl").read_text() == text               # order is nothing
    found = datasets.load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train",
                                  cache_dir=str(tmp_path / "cache")).cast_column(
        "images", datasets.List(datasets.Image()))
    for row in found:
        assert row["images"][0].size == (8, 8)
        assert row["prompt"][0]["role"] == "user"
        assert row["prompt"][0]["content"][0]["type"] == "image"
        assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"
    chosen = [r["chosen"][0]["content"][0]["text"] for r in found]
    rejected = [r["rejected"][0]["content"][0]["text"] for r in found]
    assert set(zip(chosen, rejected)) == {("b", "a"), ("b", "c")}


def test_preference_pairs_of_pictures_load_as_diffusion_dpo_wants_them(tmp_path):
    import io
    for i in range(3):
        Image.new("RGB", (4 + i, 4)).save(tmp_path / f"{i}.png")
    groups = candidates([("0.png", .1), ("1.png", .3), ("2.png", .3)], "picture", "text-image-text")
    said = outputs.write_pairs(groups, "clip", 0, tmp_path)
    assert said.startswith("2 preference pairs") and "1 ties" in said
    found = datasets.load_dataset("parquet", data_files=str(tmp_path / "pairs.parquet"),
                                  split="train", cache_dir=str(tmp_path / "cache"))
    assert {"caption", "jpg_0", "jpg_1", "label_0", "label_1"} <= set(found.column_names)
    sizes = {tuple(Image.open(io.BytesIO(r[f"jpg_{i}"])).width for i in (0, 1)) for r in found}
    assert sizes == {(5, 4), (6, 4)} and all(r["label_0"] == 1 and r["label_1"] == 0 for r in found)


# ---------------------------------------------------------------- for people
def row(item, caption, score, candidate, picture=None, **more):
    direction = "image-text-image" if picture is None else "text-image-text"
    return {"item": item, "direction": direction, "candidate": candidate, "caption": caption,
            "input": more.pop("input", item), "picture": picture, "scores": {"both": score},
            "errors": {"both": .5}, "gaps": {"both": more.pop("gap", 0)}} | more


def test_the_table_is_no_formula(tmp_path):
    """As csv reads it; a cell of letters that a spreadsheet would compute begins with a quote."""
    rows = [row("=a.png", "+1 \"red\", hoop", 2.5, 1), row("=a.png", "@SUM(A1)", 2.25, 0, gap=.3),
            row("=a.png", "-2+3", None, 2)]
    ordered = {"=a.png": best_of_n.with_reason(rows, "both")}
    outputs.write_table(ordered, "both", tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_bytes().startswith(b"\xef\xbb\xbfrank,tie,item")
    with open(tmp_path / "x.csv", encoding="utf-8-sig", newline="") as file:
        found = list(csv.DictReader(file))
    assert [r["caption"] for r in found] == ["'+1 \"red\", hoop", "'@SUM(A1)", "'-2+3"]
    assert {r["item"] for r in found} == {"'=a.png"}
    assert [(r["rank"], r["tie"], r["both"]) for r in found] == [
        ("1", "", "2.5"), ("2", "tie", "2.25"), ("3", "", "")]
    assert found[1]["gap of both"] == "0.3" and found[1]["error of both"] == "0.5"


def imagefolder(folder, cache):
    found = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(cache))
    assert list(found) == ["train"]              # none of the names is taken for a split
    return {r["text"]: r["image"] for r in found["train"]}


def test_winners_of_pictures_read_back(tmp_path):
    """By datasets: every caption with its picture, whatever the files are called."""
    names = ["a/IMG 1.JPG", "b/IMG 1.jpg", "test.png", "x_val_2.png", "dev-0.png", "trainer.png"]
    groups = {}
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (10 + i, 10)).save(tmp_path / name)
        groups[name] = [row(name, f"caption {i}", 1, 0, input=str(tmp_path / name)),
                        row(name, "worse", 0, 1, input=str(tmp_path / name))]
    groups["none"] = [row("none", "no score", None, 0)]
    said = outputs.write_winners(groups, "both", tmp_path / "out")
    folder = tmp_path / "out/winners"
    assert said == f"6 winners are in {folder}; 1 items have none"
    found = imagefolder(folder, tmp_path / "cache")
    assert {text: image.width for text, image in found.items()} == {
        f"caption {i}": 10 + i for i in range(6)}
    assert (folder / "IMG-1.txt").read_text() == "caption 0\n"
    assert (folder / "IMG-1-2.txt").read_text() == "caption 1\n" and (folder / "Test.png").exists()


def test_winners_of_sentences_are_named_after_them(tmp_path):
    prompts = ["a red ring", "A red ring", "a test/of: \"names\"?", "ein Bär", "x" * 300, "..."]
    (tmp_path / "out").mkdir()
    groups = {}
    for i, prompt in enumerate(prompts):
        Image.new("RGB", (10 + i, 10)).save(tmp_path / f"out/{i}.png")
        groups[prompt] = [row(prompt, prompt, 1, 0, picture=f"{i}.png")]
    outputs.write_winners(groups, "both", tmp_path / "out")
    found = imagefolder(tmp_path / "out/winners", tmp_path / "cache")
    assert {text: image.width for text, image in found.items()} == {
        prompt: 10 + i for i, prompt in enumerate(prompts)}
    names = {path.stem for path in (tmp_path / "out/winners").glob("*.png")}
    assert names == {"a-red-ring", "A-red-ring-2", "a-Test-of-names", "ein-Bär", "x" * 60,
                     "winner"}


def test_what_was_there_is_said(tmp_path):
    """A caption that somebody has changed, or that another score had chosen."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    groups = {x: [row(x, "a ring", 1, 0, input=str(tmp_path / x))] for x in ("a.png", "b.png")}
    folder = tmp_path / "winners"
    assert outputs.write_winners(groups, "both", tmp_path) == f"2 winners are in {folder}"
    assert outputs.write_winners(groups, "both", tmp_path) == f"2 winners are in {folder}"
    (folder / "a.txt").write_text("by hand\n")
    (folder / "notes.txt").write_text("mine")
    said = outputs.write_winners({"a.png": groups["a.png"]}, "both", tmp_path)
    assert said.endswith("of those that were there, 1 had another caption, and 1 are removed")
    assert {path.name for path in folder.iterdir()} == {"a.png", "a.txt", "metadata.jsonl",
                                                        "notes.txt"}


# ---------------------------------------------------------------- what it is worth
def test_worth_where_items_have_different_numbers(capsys):
    """Against means by hand over CIDEr of the captions there are."""
    class Item:
        def __init__(self, name, captions):
            self.name, self.captions = name, captions
    items = [Item("a", ["a red ring", "a red hoop"]), Item("b", ["a blue box at night", "a box"]),
             Item("c", ["one"])]                 # no references to speak of
    groups = {"a": [row("a", "a red ring", 1, 0), row("a", "a cat", 2, 1), row("a", "a hoop", 0, 2)],
              "b": [row("b", "a blue box", 5, 0)], "c": [row("c", "x", 1, 0)]}
    outputs.show_worth(groups, items, "both")
    df = metrics.document_frequency([item.captions for item in items])
    a = [float(metrics.cider([r["caption"]], [items[0].captions], df)[0]) for r in groups["a"]]
    b = float(metrics.cider(["a blue box"], [items[1].captions], df)[0])
    mean, chosen, oracle = sum(a) / 3 + b, a[1] + b, max(a) + b
    said = capsys.readouterr().out
    assert f"mean {50 * mean:6.1f}   chosen {50 * chosen:6.1f}   oracle {50 * oracle:6.1f}" in said
    assert said.splitlines()[-1].startswith("By both: 2 items do not tell")
    outputs.show_worth({"a": groups["a"]}, items, "both")
    assert not capsys.readouterr().out           # CIDEr of one is 0 by its definition


def test_a_score_that_some_items_lack_does_not_choose():
    groups = {}
    for i in range(3):
        groups[i] = [{"scores": {"a": 1, "b": None if i else 2, "c": 1}},
                     {"scores": {"a": 2, "b": None, "c": 2 if i else None}}]
    notes = []
    found = best_of_n.rankings(groups, notes)
    assert found["a"] == [[1, 2]] * 3 and found["c"][0] == [1, float("-inf")] and "b" not in found
    assert notes == ["no choice by b: some items have no such score",
                     "1 candidates without c come last by it"]


def test_reasons_in_words():
    def why(*scores, by="both"):
        rows = [{"scores": {"both": s}, "gaps": {"both": gap}} for s, gap in scores]
        return best_of_n.with_reason(rows, by)
    two = why((.5, 0), (.487, .017), (.3, .1))
    assert two[0]["why"] == ("+0.013, within its error of 0.017: a tie with 2; +0.200 before 3, "
                             "beyond its error of 0.100")
    assert [r.get("tie") for r in two] == [None, True, False] and two[1]["behind"][1] == .017
    assert why((1, 0), (1, 0), (1, 0), (.5, None))[0]["why"] == "equal to 2 and 3, a tie; +0.500 before 4"
    assert why((1, 0), (.9, .05), (.8, .3))[0]["why"] == (
        "+0.200, within its error of 0.300: a tie with 3; +0.100 before 2, beyond its error of 0.050")
    assert why((None, None), (None, None))[0]["why"].startswith("no winner")
    assert why((1, 0), (None, None))[0]["why"] == "the only one that has a score"
