"""rerank.py from end to end on the miniature: what comes out, what is refused, what a kill leaves."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

import rerank

FAST = ["--n", "3", "--steps", "2", "--scorer", "full"]


def run(*argv, out):
    return rerank.main(rerank.flags([*map(str, argv), *FAST, "--device", "cpu", "--out", str(out)]))


def rows(out):
    return [json.loads(line) for line in (out / "candidates.jsonl").read_text().splitlines()]


def core(out):
    """What must not hang on how the work was done."""
    return [(r["item"], r["caption"], r["rank"]) for r in rows(out)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("rerank") / "run"
    assert run("--limit", 3, out=out) == 0
    return out


def test_what_comes_out(finished, capsys):
    lines = rows(finished)
    assert len(lines) == 9 and [r["candidate"] for r in lines[:3]] == [0, 1, 2]
    for r in lines:
        assert set(r["scores"]) == {"clip", "dino", "pixel", "clipscore", "likelihood"} == set(r["rank"])
        assert Image.open(finished / r["picture"]).size == (32, 32)
    for item in {r["item"] for r in lines}:
        mine = [r for r in lines if r["item"] == item]
        assert sorted(mine, key=lambda r: r["rank"]["clip"]) == sorted(mine, key=lambda r: -r["scores"]["clip"])
    best = json.loads((finished / "best.json").read_text())
    assert all(best[r["item"]]["caption"] == r["caption"] for r in lines if r["rank"]["clip"] == 0)
    assert Image.open(finished / "sheet.png").width > 400
    page = (finished / "index.html").read_text()
    assert page.count("<figure class=best>") == 3 and "http" not in page and "<script" not in page


def test_a_pictures_scores_are_those_of_the_files(finished):
    """The columns, recomputed from what lies on disk with a likeness written here."""
    import data
    for r in rows(finished):
        a, b = data.open_image(finished / r["picture"]), data.open_image(r["input"])
        assert abs(r["scores"]["pixel"] + float((a - b).square().mean().sqrt())) < 3e-3


def test_again_redoes_nothing_and_ranks_anew(finished, monkeypatch, tmp_path, capsys):
    import cycle
    monkeypatch.setattr(cycle.Captioner, "load", lambda *a: pytest.fail("nothing was left to do"))
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert run("--limit", 3, "--by", "pixel", out=out) == 0
    assert rows(out) == rows(finished)
    best = json.loads((out / "best.json").read_text())
    assert all(best[r["item"]]["caption"] == r["caption"] for r in rows(out) if r["rank"]["pixel"] == 0)
    with pytest.raises(ValueError, match="--by sbert"):
        run("--limit", 3, "--by", "sbert", out=out)


def test_after_a_kill_it_goes_on(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    whole = (out / "candidates.jsonl").read_text()
    (out / "candidates.jsonl").write_text(whole[:len(whole) // 2])          # in the middle of a line
    assert run("--limit", 3, out=out) == 0
    assert core(out) == core(finished)


def test_other_settings_on_the_same_folder_are_refused(finished):
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        run("--limit", 3, "--seed", 1, out=finished)


def test_another_set_is_another_run(finished):
    """Items of two sets may have one name."""
    with pytest.raises(ValueError, match="set was miniature test, is miniature near"):
        run("--limit", 3, "--split", "near", out=finished)


def test_a_phone_s_picture_stands_upright(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"
                                           b"\0\0\0\x01\0\x06\0\0\0\0\0\0")
    square = rerank.frame(tmp_path / "x.jpg", 80)
    assert square.getpixel((5, 40)) == (255, 255, 255) and square.getpixel((40, 5))[1] < 40


def test_images_for_sentences(tmp_path):
    (tmp_path / "two.txt").write_text("a small red ball on the grass\n\na large blue ring at night\n")
    assert run(tmp_path / "two.txt", "--likeness", "sbert", "clip", "cider", out=tmp_path / "out") == 0
    lines = rows(tmp_path / "out")
    assert len(lines) == 6 and lines[0]["item"] == "a small red ball on the grass"
    assert set(lines[0]["scores"]) == {"sbert", "clip", "cider", "clipscore", "likelihood"}


def test_captions_are_escaped(finished, tmp_path):
    lines = rows(finished)
    lines[0]["caption"] = "<script>alert('x')</script> & co"
    shutil.copytree(finished, tmp_path / "run")
    rerank.page([("<b>", None, "<i>", lines[:3])], "clip", "image-text-image", "<u>", tmp_path / "run" / "x.html")
    page = (tmp_path / "run" / "x.html").read_text()
    assert "<script" not in page and "<b>1.</b> &lt;script&gt;" in page and "<i>" not in page and "<u>" not in page


def test_pictures_of_any_kind_and_one_that_is_none(tmp_path, capsys):
    for i, mode in enumerate(("RGBA", "L", "CMYK")):
        Image.new(mode, (40 + i, 30)).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    assert run(tmp_path, "--likeness", "pixel", out=tmp_path / "out") == 0
    assert len({r["item"] for r in rows(tmp_path / "out")}) == 3
    said = capsys.readouterr()
    assert "broken.png" in said.err and "1 skipped" in said.out
    with pytest.raises(ValueError, match="none of the 1 pictures"):
        run(tmp_path / "broken.png", "--likeness", "pixel", out=tmp_path / "none")


@pytest.mark.parametrize("argv,said", [
    (["no.png"], "no.png: no such picture"), (["a red ball", "PICTURE"], "one kind"), ([" "], "empty sentence"),
    (["list.json"], "list.json: expected a JSON list"), (["--data", "/no/set"], "no data set at /no/set"),
    (["--captioner", "vit_b", "PICTURE"], "'vit_b'"), (["--likeness", "ssim"], "'ssim'"),
    (["--captioner", "vitb"], "nothing to rerank")])
def test_bad_input_is_refused(tmp_path, argv, said):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "list.json").write_text("{}")
    argv = [str(tmp_path / "x.png") if a == "PICTURE" else str(tmp_path / a) if a == "list.json" else a for a in argv]
    with pytest.raises(ValueError) as e:
        run(*argv, out=tmp_path / "out")
    assert said in str(e.value) and not (tmp_path / "out").exists()


def test_a_refusal_is_one_line_and_exit_2(tmp_path):
    out = subprocess.run([sys.executable, "rerank.py", "no.png", "--out", str(tmp_path / "out")], cwd=ROOT,
                         capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr == "rerank.py: no.png: no such picture\n"


def test_two_processes_share_the_work(finished, tmp_path):
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "rerank.py", "-n", "3",
                    "--steps", "2", "--scorer", "full", "--limit", "3", "--device", "cpu", "--out",
                    str(tmp_path / "out")], cwd=ROOT, check=True, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert core(tmp_path / "out") == core(finished)


# ---------------------------------------------------------------- cheaper scorers
def test_denoise_draws_only_the_winner_and_agrees(tmp_path, capsys):
    argv = ["--limit", "3", "--n", "3", "--steps", "3", "--device", "cpu", "--draws", "4",
            "--likeness", "pixel", "--agree", "2", "--out", str(tmp_path)]
    assert rerank.main(rerank.flags(argv)) == 0
    rows = [json.loads(x) for x in (tmp_path / "candidates.jsonl").read_text().splitlines()]
    out = capsys.readouterr().out
    assert len(rows) == 9 and len(list((tmp_path / "pictures").iterdir())) == 3
    best = json.loads((tmp_path / "best.json").read_text())
    for item in {r["item"] for r in rows}:
        some = [r for r in rows if r["item"] == item]
        winner = max(some, key=lambda r: r["scores"]["denoise"])
        assert winner["picture"] == best[item]["picture"] and winner["caption"] == best[item]["caption"]
        assert sum(r["picture"] is not None for r in some) == 1 and all(
            r["error"] > 0 and (r["gap"] > 0) != (r["caption"] == best[item]["caption"]) for r in some)
    assert sum(r["scores"]["pixel full"] is not None for r in rows) == 6
    assert "agreement with pixel full on 2 items" in out and "pixel again" in out and "Kendall tau" in out
    assert "not drawn" not in (tmp_path / "index.html").read_text() and (tmp_path / "sheet.png").exists()


def test_few_and_text_by_denoising(tmp_path, capsys):
    few = ["--limit", "1", "--n", "2", "--device", "cpu", "--likeness", "pixel", "--scorer", "few"]
    assert rerank.flags(few).steps == 8
    assert rerank.main(rerank.flags([*few, "--out", str(tmp_path / "few")])) == 0
    import torch
    from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    AutoencoderTiny(latent_channels=8, encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
                    num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)).save_pretrained(tmp_path / "tiny")
    assert rerank.main(rerank.flags([*few, "--decoder", str(tmp_path / "tiny"), "--agree", "1", "--out",
                                     str(tmp_path / "mud")])) == 0
    good, mud = ([x["scores"] for x in map(json.loads, (tmp_path / d / "candidates.jsonl").read_text().splitlines())]
                 for d in ("few", "mud"))
    assert all(g["pixel"] > m["pixel"] and m["pixel full"] > m["pixel"] for g, m in zip(good, mud))
    argv = ["a red ring", "--n", "3", "--steps", "50", "--device", "cpu", "--likeness", "sbert", "--out"]
    own = ["--scorer", "denoise", "--agree", "1", str(tmp_path / "text")]
    assert rerank.main(rerank.flags([*argv[:-1], *own[:-1], "--out", own[-1]])) == 0
    assert rerank.main(rerank.flags([*argv, str(tmp_path / "whole")])) == 0
    assert "agreement with sbert full on 1 items" in capsys.readouterr().out
    both = [[json.loads(x)["scores"] for x in (tmp_path / k / "candidates.jsonl").read_text().splitlines()]
            for k in ("text", "whole")]
    assert [r["sbert full"] for r in both[0]] == pytest.approx([r["sbert"] for r in both[1]], abs=1e-5)
    rows = [json.loads(x) for x in (tmp_path / "text/candidates.jsonl").read_text().splitlines()]
    assert all(r["picture"] and r["caption"] == "a red ring" for r in rows)
    assert len({r["scores"]["denoise"] for r in rows}) == 3


# ---------------------------------------------------------------- words, pairs, long prompts
def test_agreeing_on_some_items_only(tmp_path, capsys):
    """Items that were not scored twice lack the column; the report counts those that have it."""
    argv = ["--limit", "3", "--n", "2", "--steps", "2", "--device", "cpu", "--batch", "2", "--likeness", "pixel",
            "--agree", "1", "--out", str(tmp_path)]
    assert rerank.main(rerank.flags([*argv, "--scorer", "full"])) == 0
    out = capsys.readouterr().out
    assert "agreement with pixel on 1 items" in out and "CIDEr of 3 items by pixel " in out
    assert rerank.main(rerank.flags([*argv, "--scorer", "full", "--by", "pixel again"])) == 0
    assert sum(x["score"] is None for x in json.loads((tmp_path / "best.json").read_text()).values()) == 2


def test_agreement_by_hand():
    """Two items of three candidates: one order equal to the full cycle's, one reversed."""
    import metrics
    from data import Item
    said, references = ["a red ring", "a blue box", "two green hearts"], [["a red ring", "a red hoop"], ["a blue box"]]
    image = {"direction": "image-text-image"}
    groups = {k: [image | {"caption": c, "scores": {"clip": s, "clip full": f, "clip again": f}}
                  for c, s, f in zip(said, some, (3, 2, 1))] for k, some in (("x", (.3, .2, .1)), ("y", (.1, .2, .3)))}
    groups["z"] = [image | {"caption": c, "scores": {"clip": 0, "clip full": None, "clip again": None}} for c in said]
    lines = rerank.agreement(groups, [Item(k, None, [*r, ""]) for k, r in zip("xy", references)], metrics)
    quality = [100 * metrics.cider(said, [[*r, ""]] * 3, metrics.document_frequency([[*r, ""] for r in references]))
               for r in references]
    gain = [sum(q[i] - q.mean() for q, i in zip(quality, chosen)) / 2 for chosen in ((0, 2), (0, 0))]
    assert lines[0] == "agreement with clip full on 2 items:" and len(lines) == 3
    assert lines[1].split("choice ")[1] == (f"0.50   Kendall tau +0.00   CIDEr gain {gain[0]:+.1f} of {gain[1]:+.1f}, "
                                            f"{gain[0] / gain[1]:.2f}")
    assert "first choice 1.00   Kendall tau +1.00" in lines[2] and lines[2].endswith(", 1.00")
    assert "no item was scored" in rerank.agreement({"x": [{"caption": "a", "scores": {"denoise": 1}}]}, [], metrics)[0]


def test_other_settings_go_to_another_folder(finished, tmp_path, monkeypatch):
    """Without --out a run goes on where its settings are at home, or where nothing is."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "out/rerank")
    settings = json.loads((finished / "settings.json").read_text())
    (tmp_path / "out/rerank-2").mkdir()
    (tmp_path / "out/rerank-2/settings.json").write_text(json.dumps(settings | {"seed": "1"}))
    own = ["-n", "3", "--steps", "2", "--scorer", "full", "--split", "test"]
    for more, name in (([], "rerank"), (["--seed", "1"], "rerank-2"), (["--seed", "2"], "rerank-3")):
        assert rerank.place(rerank.flags([*own, *more]), "image-text-image") == rerank.Path("out") / name
    shutil.rmtree(tmp_path / "out/rerank")
    assert rerank.place(rerank.flags([*own, "--seed", "1"]), "image-text-image").name == "rerank-2"


def test_words_of_the_chosen_caption(finished, tmp_path, monkeypatch, capsys):
    import cycle
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert run("--limit", 3, "--words", out=out) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(x) for x in (out / "words.jsonl").read_text().splitlines()]
    best = json.loads((out / "best.json").read_text())
    assert len(lines) == 3
    for r in lines:
        assert " ".join(w for w, *_ in r["words"]) == r["caption"] == best[r["item"]]["caption"]
        assert "".join(f"\n        {w:12s} {v:+.4f} +- {e:.4f}" for w, v, e in r["words"]) in printed
    assert (out / "index.html").read_text().count("<span style=") == sum(len(r["words"]) for r in lines)
    monkeypatch.setattr(cycle.Generator, "load", lambda *a: pytest.fail("the words are known"))
    assert run("--limit", 3, "--words", out=out) == 0


def candidates(scores, key="caption", direction="image-text-image"):
    return {"x": [{"item": "x", "direction": direction, "input": "tests/x.png", "caption": "a ring",
                   "scores": {"clip": s}} | {key: name} for name, s in scores]}


def test_preference_pairs_of_captions_load_as_trl_wants_them(tmp_path):
    import datasets
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    scores = [("a", .5), ("b", .9), ("a", .5), ("c", .52), ("d", None)]
    args = rerank.flags(["--pairs", "trl", "--margin", ".05", "--out", str(tmp_path)])
    groups = candidates(scores)
    for r in groups["x"]:
        r["input"] = str(tmp_path / "x.png")
    said = rerank.preferences(args, groups, "clip")
    text = (tmp_path / "pairs.jsonl").read_text()
    assert said.startswith("2 preference pairs") and "1 ties" in said                              # c - a is a tie
    assert said.endswith("1 candidates equal to another one, 1 without a score")
    rerank.preferences(args, {"x": groups["x"][::-1]}, "clip")
    assert (tmp_path / "pairs.jsonl").read_text() == text                                          # order is nothing
    found = datasets.load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train",
                                  cache_dir=str(tmp_path / "cache")).cast_column(
        "images", datasets.List(datasets.Image()))
    for row in found:
        assert row["images"][0].size == (8, 8)
        assert row["prompt"][0]["role"] == "user" and row["prompt"][0]["content"][0]["type"] == "image"
        assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"
    pairs = {(r["chosen"][0]["content"][0]["text"], r["rejected"][0]["content"][0]["text"]) for r in found}
    assert pairs == {("b", "a"), ("b", "c")}


def test_preference_pairs_of_pictures_load_as_diffusion_dpo_wants_them(tmp_path):
    import io

    import datasets
    for i in range(3):
        Image.new("RGB", (4 + i, 4)).save(tmp_path / f"{i}.png")
    groups = candidates([("0.png", .1), ("1.png", .3), ("2.png", .3)], "picture", "text-image-text")
    args = rerank.flags(["--pairs", "diffusion", "--out", str(tmp_path)])
    assert "2 preference pairs" in (said := rerank.preferences(args, groups, "clip")) and "1 ties" in said
    found = datasets.load_dataset("parquet", data_files=str(tmp_path / "pairs.parquet"), split="train",
                                  cache_dir=str(tmp_path / "cache"))
    assert {"caption", "jpg_0", "jpg_1", "label_0", "label_1"} <= set(found.column_names)
    sizes = {tuple(Image.open(io.BytesIO(r[f"jpg_{i}"])).width for i in (0, 1)) for r in found}
    assert sizes == {(5, 4), (6, 4)} and all(r["label_0"] == 1 and r["label_1"] == 0 for r in found)
    with pytest.raises(ValueError, match="trl compares captions"):
        rerank.preferences(rerank.flags(["--pairs", "trl"]), groups, "clip")


def test_long_prompts_are_counted(tmp_path, capsys):
    long = "a red ring to the left of a blue box and " * 9 + "a green heart"
    assert run(long, "--likeness", "cider", "sbert", out=tmp_path) == 0
    assert all(r["cut"] for r in rows(tmp_path)) and "3 of 3 captions are longer" in capsys.readouterr().out


def test_nothing_need_be_drawn(tmp_path):
    argv = ["--limit", "2", "--n", "3", "--steps", "0", "--device", "cpu", "--draws", "1", "--out", str(tmp_path)]
    assert rerank.main(rerank.flags([*argv, "--likeness", "pixel"])) == 0
    found = rows(tmp_path)
    assert len(found) == 6 and not (tmp_path / "pictures").exists() and (tmp_path / "sheet.png").exists()
    assert all(r["picture"] is None and r["error"] is None is r["gap"] for r in found)         # one draw tells no error
    for more in (["--scorer", "few"], ["a red ring"]):
        with pytest.raises(ValueError, match="--steps 0: only --scorer denoise"):
            rerank.main(rerank.flags([*more, "--steps", "0", "--out", str(tmp_path / "x")]))
