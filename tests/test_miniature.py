"""The training of the miniature: resumable to the last bit, giving directories that load; and what is shipped."""
import json
import shutil

import pytest
import torch
from conftest import ROOT

from miniature import train, world


def test_a_killed_training_ends_where_a_whole_one_does(tmp_path):
    def run(work, steps, stop=None):
        work.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def loss(step):
            if step == stop:
                raise KeyboardInterrupt
            return model(torch.randn(8, 3, generator=train.chance("t", step))).square().mean() + model.weight.sum()
        train.train("t", [model], loss, steps, work, 1e-2, warm=5, every=7)
        return model.state_dict()
    whole = run(tmp_path / "a", 30)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", 30, stop=17)
    resumed = run(tmp_path / "b", 30)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_training_from_nothing_gives_directories_that_load(tmp_path, monkeypatch, images):
    """All parts at a five-hundredth of their size: the files of the shipped miniature, the shapes of its outputs."""
    import cycle
    import metrics
    monkeypatch.setattr(train, "POOL", dict(train.POOL))
    monkeypatch.setattr(train, "SHIPPED", {"val": 2, "test": 2, "near": 2, "out": 2})
    assert not train.main(train.flags(["--scale", "0.002", "--out", str(tmp_path / "out"), "--work",
                                               str(tmp_path / "work")]))
    made, shipped = ({p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix in (".safetensors", ".json")}
                     for root in (tmp_path / "out", ROOT / "miniature"))
    assert made == shipped
    captioner = cycle.Captioner.load(str(tmp_path / "out" / "blip"), "cpu")
    generator = cycle.Generator.load(str(tmp_path / "out" / "sd"), "cpu")
    likeness = metrics.likenesses(["clip", "dino"], "image", str(tmp_path / "out"))
    assert not likeness.absent
    talk = cycle.image_text_image(captioner, generator, images[:1], 2, likeness.pairs, draw={"steps": 2})
    assert talk.images.shape == (1, 2, 3, 32, 32) and set(talk.scores) == {"clip", "dino"}
    shutil.rmtree(tmp_path / "work")


def test_the_reader_reads_pictures(images, scenes):
    model = world.reader(ROOT / "miniature/reader/model.safetensors")
    for seen, scene in zip(world.read_back(model, images), scenes):
        assert world.colour_shapes(seen) == world.colour_shapes(scene) and seen["ground"] == scene["ground"]
        for o in scene["objects"]:
            assert any(abs(o["x"] - s["x"]) < 3 and abs(o["y"] - s["y"]) < 3 and s["size"] == o["size"]
                       for s in seen["objects"])


def test_what_is_shipped_is_small_and_safe():
    files = [p for p in (ROOT / "miniature").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files if p.suffix == ".safetensors") < 20e6
    assert {p.suffix for p in files} <= {".py", ".md", ".safetensors", ".json", ".png", ".txt"}
    assert json.loads((ROOT / "miniature/sd/model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_the_two_tokenizers_differ(captioner, generator):
    """Words that one keeps whole the other splits: the bridge between them has something to do."""
    words = [w for w in {x for i in range(300) for c in world.captions(world.sample("all", i)) for x in c.split()}]
    split = [{w for w in words if len(t.tokenize(w)) > 1} for t in (captioner.tokenizer, generator.tokenizer)]
    assert split[0] and split[1] and split[0] != split[1]
