"""The training of the miniature: resumable to the last bit, giving directories that load; what is
shipped, and what its README says of it."""
import json
import shutil
from functools import partialmethod

import numpy as np
import pytest
import torch
from conftest import ROOT

import cycle
import judges
from captioners import Captioner
from generators import Generator
from miniature import check, train, world


def test_a_killed_training_ends_where_a_whole_one_does(tmp_path):
    def run(work, steps, stop=None):
        work.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def loss(step):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 3, generator=train.chance("t", step))
            return model(x).square().mean() + model.weight.sum()
        train.train("t", [model], loss, steps, work, 1e-2, warm=5, every=7)
        return model.state_dict()
    whole = run(tmp_path / "a", 30)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", 30, stop=17)
    resumed = run(tmp_path / "b", 30)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_broken_training_says_where(tmp_path):
    model = torch.nn.Linear(3, 1)

    def loss(step):
        return model.weight.sum() * (float("nan") if step == 2 else 1)
    with pytest.raises(ValueError, match=r"t broke at step 2 \(gradient norm nan\)"):
        train.train("t", [model], loss, 5, tmp_path)


def files(root):
    found = [p for p in root.rglob("*") if p.suffix in (".safetensors", ".json")]
    return {p.relative_to(root).as_posix() for p in found}


def test_training_from_nothing_gives_directories_that_load(tmp_path, images):
    """All parts at a thousandth of their size: the files of the shipped miniature, the shapes
    of its outputs."""
    out = tmp_path / "out"
    small = ["--scale", "0.001", "--count", "2"]
    argv = [*small, "--out", str(out), "--work", str(tmp_path / "work")]
    assert not train.main(train.flags(argv))
    assert files(out) == files(ROOT / "miniature")
    captioner = Captioner.load(str(out / "blip"), "cpu")
    generator = Generator.load(str(out / "sd"), "cpu")
    found, missing = judges.load(["clip", "dino"], "image", str(out))
    assert not missing
    likeness = {name: judge.alike for name, judge in found.items()}
    talk = cycle.image_text_image(captioner, generator, images[:1], 2, likeness, draw={"steps": 2})
    assert talk.images.shape == (1, 2, 3, 32, 32) and set(talk.scores) == {"clip", "dino"}
    shutil.rmtree(tmp_path / "work")


def test_the_shipped_pictures_are_made_again(tmp_path):
    """`--parts splits` draws what data/ holds; --count more or fewer of each."""
    argv = ["--parts", "splits", "--count", "3", "--out", str(tmp_path), "--work", str(tmp_path)]
    assert not train.main(train.flags(argv))
    shipped = ROOT / "miniature/data"
    drawn = sorted((tmp_path / "data").rglob("*.png"))
    assert len(drawn) == 12
    for path in drawn:
        assert path.read_bytes() == (shipped / path.relative_to(tmp_path / "data")).read_bytes()
    ours, theirs = (json.loads((root / "dataset_coco.json").read_text())["images"]
                    for root in (tmp_path / "data", shipped))
    assert len(ours) == 6 and ours[:3] == theirs[:3]


def test_the_reader_reads_pictures(images, scenes):
    model = world.reader(ROOT / "miniature/reader/model.safetensors")
    for seen, scene in zip(world.read_back(model, images), scenes):
        assert world.colour_shapes(seen) == world.colour_shapes(scene)
        assert seen["ground"] == scene["ground"]
        for o in scene["objects"]:
            assert any(abs(o["x"] - s["x"]) < 3 and abs(o["y"] - s["y"]) < 3
                       and s["size"] == o["size"] for s in seen["objects"])


def test_what_is_shipped_is_small_and_safe():
    shipped = [p for p in (ROOT / "miniature").rglob("*") if p.is_file()]
    shipped = [p for p in shipped if p.parent.name != "__pycache__"]
    assert sum(p.stat().st_size for p in shipped if p.suffix == ".safetensors") < 20e6
    assert {p.suffix for p in shipped} <= {".py", ".md", ".safetensors", ".json", ".png", ".txt"}
    index = json.loads((ROOT / "miniature/sd/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_the_two_tokenizers_differ(captioner, generator):
    """Words that one keeps whole the other splits: the bridge between them has something to do."""
    captions = [c for i in range(300) for c in world.captions(world.sample("all", i))]
    words = set(" ".join(captions).split())
    split = [{w for w in words if len(t.tokenize(w)) > 1}
             for t in (captioner.tokenizer, generator.tokenizer)]
    assert split[0] and split[1] and split[0] != split[1]


# ---------------------------------------------------------------- is it good enough?
def test_check_measures_counts_what_it_missed_and_writes_it_down(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(check.BARS, "generator pairs, in", 1.01)
    monkeypatch.setattr(Generator, "draw", partialmethod(Generator.draw, steps=2))
    assert check.main(check.flags(["--scenes", "4", "--work", str(tmp_path)])) == 1
    out = capsys.readouterr().out
    line = next(x for x in out.splitlines() if x.startswith("generator pairs, in "))
    assert line.endswith("n=4   bar 1.01  MISSED")
    found = json.loads((tmp_path / "check.json").read_text())
    committed = json.loads((ROOT / "lab/results/check.json").read_text())
    assert found.keys() == committed["figures"].keys()
    assert found["real pairs"]["value"] == 1 and found["real pairs"]["n"] == 12
    assert all(row["low"] <= row["value"] <= row["high"] for row in found.values())


def test_intervals_are_of_means():
    values = np.random.default_rng(3).normal(size=400)
    figures = check.intervals({"captioner facts, in": values, "captioner facts, out": values - 1})
    mean, low, high, n = figures["captioner facts, in"]
    assert n == 400 and mean == values.mean()
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=.1)
    gap, low, high, _ = figures["captioner facts, in - out"]
    assert gap == pytest.approx(1)
    assert (high - low) / 2 == pytest.approx(1.96 * 2 ** .5 / 20, rel=.1)


def test_the_readme_says_what_was_measured():
    """Each row of its table is of lab/results/check.json, and so is whether the bars were met."""
    figures = json.loads((ROOT / "lab/results/check.json").read_text())["figures"]
    text = (ROOT / "miniature/README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = {row[0]: row[1:] for row in rows}
    names = {"facts of a caption that are true": "captioner facts",
             "drawings with every pair right": "generator pairs",
             "reconstructions with every pair right": "vae pairs",
             "true pictures with every pair right": "real pairs",
             "different captions of ten": "captions distinct of 10"}
    for said, name in names.items():
        found = [figures[f"{name}, {domain}"] for domain in ("in", "near", "out")]
        assert rows[said][:3] == ["{value:.3f} [{low:.3f}, {high:.3f}]".format(**x) for x in found]
    for name, bar in check.BARS.items():
        assert figures[name]["bar"] == bar <= figures[name]["value"], name
