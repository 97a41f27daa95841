"""rerank.py from end to end on the miniature: what comes out, what is refused, what a kill
leaves."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.stats
import torch
from conftest import ROOT
from PIL import Image

import best_of_n
import cycle
import data
import inputs
import judges
import losses
import records
import rerank
from captioners import Captioner
from generators import Generator
from miniature import world

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
        assert set(r["scores"]) == {"clip", "dino", "pixel", "clipscore", "likelihood", "per_token"}
        assert set(r["rank"]) == set(r["scores"])
        assert Image.open(finished / r["picture"]).size == (32, 32)
    for item in {r["item"] for r in lines}:
        mine = [r for r in lines if r["item"] == item]
        by_rank = sorted(mine, key=lambda r: r["rank"]["clip"])
        assert by_rank == sorted(mine, key=lambda r: -r["scores"]["clip"])
    best = json.loads((finished / "best.json").read_text())
    assert all(best[r["item"]]["caption"] == r["caption"] for r in lines if r["rank"]["clip"] == 0)
    assert Image.open(finished / "sheet.png").width > 400
    page = (finished / "index.html").read_text()
    assert page.count('<figure class="best">') == 3 and "http" not in page and "<script" not in page


def test_a_pictures_scores_are_those_of_the_files(finished):
    """The columns, recomputed from what lies on disk with a likeness written here."""
    for r in rows(finished):
        a, b = data.open_image(finished / r["picture"]), data.open_image(r["input"])
        assert abs(r["scores"]["pixel"] + float((a - b).square().mean().sqrt())) < 3e-3


def test_again_redoes_nothing_and_ranks_anew(finished, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Captioner, "load", lambda *a: pytest.fail("nothing was left to do"))
    monkeypatch.setattr(judges, "load", lambda *a: pytest.fail("nothing was left to judge"))
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert run("--limit", 3, "--by", "pixel", out=out) == 0
    assert rows(out) == rows(finished)
    best = json.loads((out / "best.json").read_text())
    first = [r for r in rows(out) if r["rank"]["pixel"] == 0]
    assert all(best[r["item"]]["caption"] == r["caption"] for r in first)
    with pytest.raises(ValueError, match="--by sbert"):
        run("--limit", 3, "--by", "sbert", out=out)


def test_after_a_kill_it_goes_on(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    whole = (out / "candidates.jsonl").read_text()
    (out / "candidates.jsonl").write_text(whole[:len(whole) // 2])      # within a line
    assert run("--limit", 3, out=out) == 0
    assert core(out) == core(finished)


def test_other_settings_on_the_same_folder_are_refused(finished):
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        run("--limit", 3, "--seed", 1, out=finished)


def test_another_set_is_another_run(finished):
    """Items of two sets may have one name."""
    with pytest.raises(ValueError, match="split was test, is near"):
        run("--limit", 3, "--split", "near", out=finished)


def test_images_for_sentences(tmp_path):
    two = tmp_path / "two.txt"
    two.write_text("a small red ball on the grass\n\na large blue ring at night\n")
    assert run(two, "--likeness", "sbert", "clip", "cider", out=tmp_path / "out") == 0
    lines = rows(tmp_path / "out")
    assert len(lines) == 6 and lines[0]["item"] == "a small red ball on the grass"
    assert set(lines[0]["scores"]) == {"sbert", "clip", "cider", "clipscore", "likelihood",
                                       "per_token"}


def test_pictures_of_any_kind_and_one_that_is_none(tmp_path, capsys):
    for i, mode in enumerate(("RGBA", "L", "CMYK")):
        ending = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (40 + i, 30)).save(tmp_path / f"{mode}.{ending}")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    assert run(tmp_path, "--likeness", "pixel", out=tmp_path / "out") == 0
    assert len({r["item"] for r in rows(tmp_path / "out")}) == 3
    said = capsys.readouterr()
    assert "broken.png" in said.err and "1 skipped" in said.out
    with pytest.raises(ValueError, match="none of the 1 inputs"):
        run(tmp_path / "broken.png", "--likeness", "pixel", out=tmp_path / "none")


@pytest.mark.parametrize("argv,said", [
    (["no.png"], "no.png: no such picture"), (["a red ball", "PICTURE"], "one kind"),
    ([" "], "empty sentence"), (["list.json"], "list.json: expected a JSON list"),
    (["no.txt"], "no.txt: no such file"), (["--data", "/no/set"], "no data set at /no/set"),
    (["--captioner", "vit_b", "PICTURE"], "'vit_b'"), (["--likeness", "ssim"], "'ssim'"),
    (["--captioner", "vitb"], "nothing to rerank")])
def test_bad_input_is_refused(tmp_path, argv, said):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "list.json").write_text("{}")
    known = {"PICTURE": tmp_path / "x.png", "list.json": tmp_path / "list.json"}
    argv = [str(known.get(a, a)) for a in argv]
    with pytest.raises(ValueError) as e:
        run(*argv, out=tmp_path / "out")
    assert said in str(e.value) and [*(tmp_path / "out").glob("[!.]*")] == []


def test_a_refusal_is_one_line_and_exit_2(tmp_path):
    command = [sys.executable, "rerank.py", "no.png", "--out", str(tmp_path / "out")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr == "rerank.py: no.png: no such picture\n"


def test_a_missing_model_is_told_before_the_judges(tmp_path, monkeypatch):
    """It is the cause; what judges lack would hide it."""
    def missing(*args):
        raise ValueError("no captioner there")
    monkeypatch.setattr(Captioner, "load", missing)
    monkeypatch.setattr(judges, "load", lambda *a: pytest.fail("judges first"))
    with pytest.raises(ValueError, match="no captioner there"):
        run("--limit", 1, out=tmp_path / "out")


def test_the_demo_begins_with_a_true_choice(tmp_path):
    """Of its first picture: every fact that the winner states. Nothing is drawn for that."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    demo = re.search(r"rerank\.py (.*) --out out/demo", makefile)[1].split()
    argv = [*demo, "--limit", "1", "--steps", "0", "--device", "cpu", "--out", str(tmp_path)]
    assert rerank.main(rerank.flags(argv)) == 0
    best, = json.loads((tmp_path / "best.json").read_text()).values()
    split = demo[demo.index("--split") + 1]
    right, stated = world.verify(best["caption"], world.sample(split, 0))
    assert right == stated >= 4


def test_two_processes_share_the_work(finished, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    argv = ["-n", "3", "--steps", "2", "--scorer", "full", "--limit", "3", "--device", "cpu"]
    subprocess.run([*torchrun, "rerank.py", *argv, "--out", str(tmp_path / "out")], cwd=ROOT,
                   check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert core(tmp_path / "out") == core(finished)


def test_what_another_process_skipped_is_counted(tmp_path, capsys, monkeypatch):
    """The first of two processes; the other's share, a broken picture, came to nothing."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    monkeypatch.setattr(records, "rank_and_world", lambda: (0, 2))
    for name in ("init_process_group", "broadcast_object_list", "barrier", "destroy_process_group"):
        monkeypatch.setattr(rerank.dist, name, lambda *a, **k: None)
    assert run(tmp_path, "--likeness", "pixel", out=tmp_path / "out") == 0
    assert "1 of 2 inputs done, 1 skipped" in capsys.readouterr().out


# ---------------------------------------------------------------- cheaper scorers
@pytest.mark.parametrize("by", [None, "both"])
def test_only_the_winner_is_drawn(tmp_path, by):
    argv = ["--limit", "3", "--n", "3", "--steps", "3", "--device", "cpu", "--draws", "4",
            "--likeness", "pixel", "--out", str(tmp_path)]
    argv += ["--by", by] if by else []
    by = by or "denoise"
    assert rerank.main(rerank.flags(argv)) == 0
    found = rows(tmp_path)
    assert len(found) == 9 and len(list((tmp_path / "pictures").iterdir())) == 3
    best = json.loads((tmp_path / "best.json").read_text())
    for item in {r["item"] for r in found}:
        some = [r for r in found if r["item"] == item]
        winner = max(some, key=lambda r: r["scores"][by])
        assert winner["picture"] == best[item]["picture"]
        assert winner["caption"] == best[item]["caption"]
        assert sum(r["picture"] is not None for r in some) == 1
        for r in some:
            assert set(r["scores"]) == {"both", "denoise", "likelihood", "per_token"}
            assert set(r["errors"]) == set(r["gaps"]) == {"both", "denoise"}
            assert r["errors"][by] > 0
            assert (r["gaps"][by] > 0) != (r["caption"] == best[item]["caption"])
    assert "not drawn" not in (tmp_path / "index.html").read_text()
    assert (tmp_path / "sheet.png").exists()


def test_a_winner_is_drawn_alike_in_company_and_alone(tmp_path):
    """Winners are drawn together: which others there are changes no picture."""
    argv = ["--limit", "3", "--n", "2", "--steps", "3", "--device", "cpu", "--draws", "2",
            "--likeness", "pixel"]
    for batch in ("2", "40"):
        out = tmp_path / batch
        assert rerank.main(rerank.flags([*argv, "--batch", batch, "--out", str(out)])) == 0
    one, all_ = rows(tmp_path / "2"), rows(tmp_path / "40")
    assert [r["picture"] for r in one] == [r["picture"] for r in all_]
    for a, b in zip(one, all_):
        assert a["scores"]["denoise"] == pytest.approx(b["scores"]["denoise"], abs=1e-5)
        if a["picture"]:
            pixels = [data.open_image(tmp_path / k / a["picture"]) for k in ("2", "40")]
            assert (pixels[0] - pixels[1]).abs().max() < .02


def test_few_and_a_tiny_decoder(tmp_path):
    few = ["--limit", "1", "--n", "2", "--device", "cpu", "--likeness", "pixel", "--scorer", "few"]
    assert rerank.flags(few).steps == 8
    assert rerank.main(rerank.flags([*few, "--out", str(tmp_path / "few")])) == 0
    from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    small = (8, 8, 8)
    AutoencoderTiny(latent_channels=8, encoder_block_out_channels=small,
                    decoder_block_out_channels=small, num_encoder_blocks=(1, 1, 1),
                    num_decoder_blocks=(1, 1, 1)).save_pretrained(tmp_path / "tiny")
    more = ["--decoder", str(tmp_path / "tiny"), "--out", str(tmp_path / "mud")]
    assert rerank.main(rerank.flags([*few, *more])) == 0
    for good, mud in zip(rows(tmp_path / "few"), rows(tmp_path / "mud")):
        assert good["scores"]["pixel"] > mud["scores"]["pixel"]
        assert good["caption"] == mud["caption"]


def test_pictures_of_a_text_by_both(tmp_path, captioner):
    """The same pictures as by the full cycle; the captioner reads the given text in each."""
    argv = ["a red ring", "--n", "3", "--steps", "5", "--device", "cpu", "--likeness", "sbert"]
    assert rerank.main(rerank.flags([*argv, "--out", str(tmp_path / "text")])) == 0
    whole = ["--scorer", "full", "--out", str(tmp_path / "whole")]
    assert rerank.main(rerank.flags([*argv, *whole])) == 0
    found = rows(tmp_path / "text")
    assert all(r["caption"] == "a red ring" for r in found)
    assert len({r["scores"]["denoise"] for r in found}) == 3
    for r in found:
        one, other = (data.open_image(tmp_path / k / r["picture"]) for k in ("text", "whole"))
        assert (one - other).abs().max() < .02
        loss = losses.caption_loss(captioner.read([one], ["a red ring"]))
        assert r["scores"]["per_token"] == pytest.approx(-float(loss), abs=.05)   # 8-bit picture


# ---------------------------------------------------------------- one item, by hand
def test_captions_for_two_pictures(captioner, generator, images):
    """Scores against the rooms' own functions, one at a time."""
    def darker(pictures, image):
        return image.mean() - pictures.mean((1, 2, 3))
    how = {"n": 3, "seed": 5, "items": ["x", "y"]}
    full = best_of_n.captions_for(images[:2], captioner=captioner, generator=generator,
                                  likeness={"darker": darker}, scorer="full", draw={"steps": 2},
                                  **how)
    captions, likelihood = captioner.speak(images[:2], 3, seed=5, items=["x", "y"])
    for b, item in enumerate("xy"):
        for j, row in enumerate(full[b]):
            drawn = generator.draw([captions[b][j]], [item], 5, steps=2)[0]
            assert row["caption"] == captions[b][j] and row["errors"] == {}
            assert (row["picture"] - drawn).abs().max() < 1e-3
            expected = float(images[b].mean() - drawn.mean())
            assert row["scores"]["darker"] == pytest.approx(expected, abs=1e-3)
            assert row["scores"]["likelihood"] == pytest.approx(float(likelihood[b, j]), abs=1e-4)
    cheap = best_of_n.captions_for(images[:2], captioner=captioner, generator=generator,
                                   likeness={}, draws=4, draw={"steps": 0}, **how)
    for b, item in enumerate("xy"):
        noises = cycle.noises(generator, 4, 5, item)
        loss = torch.cat([losses.score(generator, images[b], [c], *noises) for c in captions[b]], 1)
        found = [row["scores"]["denoise"] for row in cheap[b]]
        assert found == pytest.approx((-loss.mean(0)).tolist(), abs=1e-5)
        # Eq. 1 and Eq. 3, each in standard deviations among the three, by numpy
        said = [float(losses.caption_loss(captioner.read([images[b]], [c]))) for c in captions[b]]
        expected = -scipy.stats.zscore(said) - scipy.stats.zscore(loss.mean(0).numpy())
        assert [row["scores"]["both"] for row in cheap[b]] == pytest.approx(expected, abs=1e-2)
        best = int(expected.argmax())
        gaps = losses.mean_and_error(loss - loss[:, [best]])[1] / loss.mean(0).std(correction=0)
        found = [row["gaps"]["both"] for row in cheap[b]]
        assert found == pytest.approx(gaps.tolist(), abs=1e-4)
        assert [row["picture"] for row in cheap[b]] == [None] * 3
        assert [row["caption"] for row in cheap[b]] == captions[b]


def test_ranks_by_hand():
    found = [{"scores": {"clip": s, "dino": d}} for s, d in ((.1, .3), (.3, None), (.1, .4))]
    best_of_n.rank({"": found})
    assert [r["rank"] for r in found] == [{"clip": 1, "dino": 1}, {"clip": 0, "dino": 2},
                                          {"clip": 2, "dino": 0}]
    assert best_of_n.best_first(found, "clip") == [found[1], found[0], found[2]]


def test_an_item_that_lacks_candidates_is_not_done(tmp_path):
    row = {"caption": "x", "input": "a.png", "picture": None, "direction": best_of_n.IMAGE,
           "scores": {"denoise": 1.0}}
    lines = [{"item": "a", "candidate": j} | row for j in (0, 1)]
    lines.append({"item": "b", "candidate": 0} | row)
    records.write_rows(tmp_path / "candidates.jsonl", lines)
    assert best_of_n.finished(tmp_path, 2)[0] == {"a": lines[:2]}
    # counts may differ by item; what was cut off and done again counts as done
    many = [{"item": x, "candidate": j, "of": of} | row for x, of, stop in
            (("a", 3, 2), ("b", 1, 1), ("a", 3, 3), ("c", 2, 1), ("a", 3, 2)) for j in range(stop)]
    records.write_rows(tmp_path / "candidates.jsonl", many)
    assert best_of_n.finished(tmp_path, 2)[0] == {"a": many[3:6], "b": many[2:3]}


def test_rows_of_another_picture_are_not_of_this_one(tmp_path):
    """Done again where the picture is another, kept where it can't be looked at, refused where any row names another
    one: what a row names is copied and shown."""
    def found(path=tmp_path / "a.png", *pictures):
        return inputs.Inputs(best_of_n.IMAGE, [data.Item("a", path)], {"a": list(pictures)})

    def kept(now=None):
        return [list(rows) for rows in best_of_n.finished(tmp_path, 2, now or found())]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"item": "a", "caption": "x", "input": str(tmp_path / "a.png"), "picture": None, "direction":
           best_of_n.IMAGE, "scores": {"denoise": 1.0}, "mark": found().mark(found().items[0])}
    rows = [row | {"candidate": j} for j in range(2)]
    records.write_rows(tmp_path / "candidates.jsonl", rows)
    assert kept() == [["a"], []]
    (tmp_path / "a.png").unlink()
    assert kept() == [["a"], []]
    with pytest.raises(ValueError, match="'a' is of '.*a.png', not of '.*b/a.png'"):
        kept(found(tmp_path / "b/a.png"))
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert kept() == [[], ["a"]]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    records.write_rows(tmp_path / "candidates.jsonl", [rows[0], rows[1] | {"mark": None}])
    assert kept() == [[], ["a"]]
    for key, value, fault in (("input", "/etc/hostname", "'a' is of '/etc/hostname'"),
                              ("picture", "/etc/hostname", "line 2: .*hostname leads out of"),
                              ("direction", best_of_n.TEXT, "'a' is of"), ("candidate", 2, "candidate 1"),
                              ("scores", {"denoise": float("inf")}, "'denoise' inf is no score")):
        records.write_rows(tmp_path / "candidates.jsonl", [rows[0], rows[1] | {key: value}])
        with pytest.raises(ValueError, match=fault):
            kept()
    records.write_rows(tmp_path / "candidates.jsonl", [rows[0], rows[1] | {"picture": "/etc/hostname"}])
    assert kept(found(tmp_path / "a.png", Path("/etc/hostname"))) == [[], ["a"]]


# ---------------------------------------------------------------- words, pairs, long prompts
def test_two_runs_that_begin_at_once_take_two_folders(tmp_path, monkeypatch):
    """The other one has claimed out/rerank, and written nothing yet."""
    monkeypatch.chdir(tmp_path)
    hold = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import records; records.claim('out/rerank'); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    assert rerank.default_folder({"seed": "1"}) == rerank.Path("out/rerank-2")
    other.communicate("\n")
    assert rerank.default_folder({"seed": "1"}) == rerank.Path("out/rerank")        # it came to nothing


def test_other_settings_go_to_another_folder(finished, tmp_path, monkeypatch, capsys):
    """Without --out a run goes on where its settings are at home, or where nothing is."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "out/rerank")
    settings = json.loads((finished / "settings.json").read_text())
    other = [settings | {"seed": str(i)} for i in range(3)]
    (tmp_path / "out/rerank-2").mkdir()
    (tmp_path / "out/rerank-2/settings.json").write_text(json.dumps(other[1]))
    for i, name in enumerate(("rerank", "rerank-2", "rerank-3")):
        assert rerank.default_folder(other[i]) == rerank.Path("out") / name
    argv = ["-n", "3", "--steps", "2", "--scorer", "full", "--device", "cpu", "--limit", "3"]
    assert rerank.main(rerank.flags(argv)) == 0                       # at home: nothing to do
    assert "another run" not in capsys.readouterr().err
    assert [*(tmp_path / "out/rerank-3").glob("[!.]*")] == []
    own = ["--seed", "2", "-n", "1", "--likeness", "pixel"]
    assert rerank.main(rerank.flags([*argv, *own])) == 0
    assert "holds another run, or is in use; this one is in out/rerank-3" in capsys.readouterr().err
    assert len(rows(tmp_path / "out/rerank-3")) == 3
    shutil.rmtree(tmp_path / "out/rerank")
    assert rerank.default_folder(other[1]).name == "rerank-2"


def test_words_of_the_chosen_caption(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert run("--limit", 3, "--words", out=out) == 0
    printed = capsys.readouterr().out
    lines = [r for r in rows(out) if "words" in r]
    best = json.loads((out / "best.json").read_text())
    assert len(lines) == 3
    for r in lines:
        assert " ".join(w for w, *_ in r["words"]) == r["caption"] == best[r["item"]]["caption"]
        said = [f"\n        {w:12s} {v:+.4f} +- {e:.4f}" for w, v, e in r["words"]]
        assert "".join(said) in printed
    spans = (out / "index.html").read_text().count("<span style=")
    assert spans == sum(len(r["words"]) for r in lines)
    monkeypatch.setattr(Generator, "load", lambda *a: pytest.fail("the words are known"))
    assert run("--limit", 3, "--words", out=out) == 0


def test_long_prompts_are_counted(tmp_path, capsys):
    long = "a red ring to the left of a blue box and " * 9 + "a green heart"
    assert run(long, "--likeness", "cider", "sbert", out=tmp_path) == 0
    assert all(r["cut"] for r in rows(tmp_path))
    assert "3 of 3 captions are longer" in capsys.readouterr().out


def test_nothing_need_be_drawn(tmp_path):
    argv = ["--limit", "2", "--n", "3", "--steps", "0", "--device", "cpu", "--draws", "1"]
    more = ["--likeness", "pixel", "--out", str(tmp_path)]
    assert rerank.main(rerank.flags([*argv, *more])) == 0
    found = rows(tmp_path)
    assert len(found) == 6 and not (tmp_path / "pictures").exists()
    assert (tmp_path / "sheet.png").exists()
    for r in found:                              # one draw tells no error
        assert r["picture"] is None and r["errors"]["both"] is None is r["gaps"]["denoise"]
    for more in (["--scorer", "few"], ["a red ring"]):
        with pytest.raises(ValueError, match="--steps 0: only --scorer both"):
            rerank.main(rerank.flags([*more, "--steps", "0", "--out", str(tmp_path / "x")]))


# ---------------------------------------------------------------- captions and pictures that exist
def rank(*argv, out):
    """With nothing drawn."""
    return rerank.main(rerank.flags([*map(str, argv), "--device", "cpu", "--draws", "2",
                                     "--likeness", "clip", "--out", str(out)]))


def test_given_captions_score_as_if_they_were_said(captioner, generator, images):
    """Captions that exist, in both scorers: the same numbers as where the captioner said them."""
    how = {"captioner": captioner, "generator": generator, "n": 3, "seed": 5, "items": ["x", "y"],
           "likeness": {"dark": lambda pictures, image: -pictures.mean((1, 2, 3))}, "draws": 2}
    for scorer, steps in (("both", 0), ("full", 2)):
        own = best_of_n.captions_for(images[:2], scorer=scorer, draw={"steps": steps}, **how)
        said = [[row["caption"] for row in rows] for rows in own]
        again = best_of_n.captions_for(images[:2], scorer=scorer, draw={"steps": steps}, given=said,
                                       **how)
        for one, other in zip(sum(own, []), sum(again, [])):
            assert one["caption"] == other["caption"]
            assert other["scores"] == pytest.approx(one["scores"], abs=2e-3)


def test_one_picture_and_its_captions(captioner, generator, images):
    """Any number of candidates, more than a batch; against the rooms' own functions."""
    captions = ["a red ring", "a ring", "a big blue heart at night", "a red ring", ""]
    rows = best_of_n.rank_captions(images[0], captions, captioner, generator, "x", draws=3, seed=2,
                                   draw={"steps": 0, "batch": 2})
    noises = cycle.noises(generator, 3, 2, "x")
    loss = losses.score(generator, images[0], captions, *noises).mean(0)
    log_p = captioner.likelihood(images[:1].repeat(5, 1, 1, 1), captions)
    both = losses.both(log_p / captioner.tokens(captions), loss)
    order = loss.argsort(stable=True)
    assert [r["caption"] for r in rows] == [captions[i] for i in order]
    assert [r["scores"]["both"] for r in rows] == pytest.approx(both[order].tolist(), abs=1e-3)
    for wrong in ((images, captions), (images[0], "a ring"), (images[0], [])):
        with pytest.raises(ValueError, match="one picture"):
            best_of_n.rank_captions(*wrong, captioner, generator)


def test_one_text_and_its_pictures_of_any_size(captioner, generator, images):
    """One that is no numbers is last, has no score, and moves nobody else's."""
    larger = torch.nn.functional.interpolate(images[1:2], (40, 50))[0]
    pictures = [images[0], images[0] * torch.nan, larger, images[2]]
    rows = best_of_n.rank_pictures("a red ring", pictures, captioner, generator, draws=2)
    alone = best_of_n.rank_pictures("a red ring", [pictures[i] for i in (0, 2, 3)], captioner,
                                    generator, draws=2)
    assert rows[-1]["nan"] and rows[-1]["picture"] is None and not any(rows[-1]["scores"].values())
    for row, other in zip(rows, alone):
        assert row["picture"] is other["picture"]
        assert row["scores"] == pytest.approx(other["scores"], abs=1e-5)
        assert row["gaps"] == pytest.approx(other["gaps"], abs=1e-5)
    with pytest.raises(ValueError, match="one text"):
        best_of_n.rank_pictures("a ring", [], captioner, generator)


def test_captions_of_a_file(tmp_path, capsys):
    """Of any number each, from files; run again it goes on; a changed caption is ranked anew."""
    for i in range(2):
        shutil.copy(ROOT / f"miniature/data/test/000{i}.png", tmp_path / f"{i}.png")
    file = tmp_path / "mine.json"
    mine = {"0.png": ["a ring", "an orange plus and a red ring", "a cat"], "1.png": "a ball"}
    file.write_text(json.dumps(mine))
    out = tmp_path / "out"
    assert rank("--captions", file, "--steps", 3, out=out) == 0
    found = rows(out)
    assert [(r["item"], r["caption"]) for r in found] == [
        ("0.png", "a ring"), ("0.png", mine["0.png"][1]), ("0.png", "a cat"), ("1.png", "a ball")]
    assert json.loads((out / "best.json").read_text())["0.png"]["caption"] == mine["0.png"][1]
    assert sum(r["picture"] is not None for r in found) == 2               # the winners
    assert "N = as given" in (out / "index.html").read_text()
    said = capsys.readouterr()
    assert "TOY MODELS" in said.out and "the same command with --captioner vitb" in said.out
    file.write_text(json.dumps(mine | {"1.png": ["a yellow ball"]}))
    assert rank("--captions", file, "--steps", 3, out=out) == 0
    assert "1 of 2 already done" in capsys.readouterr().out
    assert [r["caption"] for r in rows(out)][3:] == ["a yellow ball"]
    with pytest.raises(ValueError, match="every candidate is ranked"):
        rank("--captions", file, "-n", 3, out=out)
    with pytest.raises(ValueError, match="give one"):
        rank("--captions", file, "a ring", out=out)


def test_captions_of_a_set_are_worth_something(tmp_path, capsys):
    """Pictures named as those of --data are that set's, with its references."""
    items = data.read("miniature", "test")[:2]
    file = tmp_path / "mine.jsonl"
    some = [{"image_id": int(x.name), "captions": ["a cat", *x.captions[:i + 1]]}
            for i, x in enumerate(items)]
    records.write_rows(file, some)
    how = ["--captions", file, "--data", "miniature", "--steps", 0]
    assert rank(*how, out=tmp_path / "out") == 0
    found = rows(tmp_path / "out")
    assert [r["item"] for r in found] == [items[0].name] * 2 + [items[1].name] * 3
    said = capsys.readouterr().out
    assert "CIDEr of 2 items by both" in said


def test_pictures_of_a_folder_of_prompts(tmp_path, capsys):
    for prompt, numbers in (("a red ring", (0, 1, 2)), ("a box", (3,))):
        (tmp_path / "in" / prompt).mkdir(parents=True)
        for i in numbers:
            shutil.copy(ROOT / f"miniature/data/test/000{i}.png", tmp_path / "in" / prompt)
    (tmp_path / "in/a box/broken.png").write_bytes(b"nothing")
    out = tmp_path / "out"
    assert rank("--images", tmp_path / "in", "--words", out=out) == 0
    said = capsys.readouterr()
    assert "broken.png" in said.err and "1 of the given pictures" in said.out
    found = rows(out)
    assert [r["item"] for r in found] == ["a box"] + ["a red ring"] * 3
    assert all(Image.open(r["picture"]).size == (32, 32) for r in found)
    assert not (out / "pictures").exists()
    best = json.loads((out / "best.json").read_text())
    assert best["a red ring"]["picture"].endswith("0000.png")              # a ring is in it
    full = ["--images", tmp_path / "in", "--scorer", "full", "--likeness", "sbert"]
    assert rerank.main(rerank.flags([*map(str, full), "--out", str(tmp_path / "full")])) == 0
    assert "1 of the given" in capsys.readouterr().out
    assert len({r["caption"] for r in rows(tmp_path / "full")}) > 2        # what was read


def test_who_only_speaks_can_not_read(generator):
    with pytest.raises(ValueError, match="no `likelihood`"):
        rerank.make_fit(object(), generator, "both", None, True, "miniature")
    rerank.make_fit(object(), generator, "both", None, False, "miniature")


# ---------------------------------------------------------------- what is not as it should be
LOST = """import torch
class Painter:
    def draw(self, captions, items=None, seed=0, **settings):
        pictures = torch.linspace(0, 1, len(captions)).view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
        pictures[::2, 0, 0, 0] = torch.nan
        return pictures
def load(device, dtype):
    return Painter()
"""


@pytest.mark.parametrize("turn", ["image", "text"])
def test_pictures_that_are_no_numbers(tmp_path, capsys, turn):
    (tmp_path / "lost.py").write_text(LOST)
    likeness = "pixel" if turn == "image" else "sbert"
    argv = ["--generator", f"{tmp_path / 'lost.py'}:load", "--turn", turn, "--limit", "2",
            "--n", "3", "--likeness", likeness, "--out", str(tmp_path / "out")]
    assert rerank.main(rerank.flags(argv)) == 0
    found = rows(tmp_path / "out")
    lost = [r for r in found if r.get("nan")]
    assert 2 <= len(lost) < len(found)
    for r in found:
        assert (r["picture"] is None) == (r["scores"][likeness] is None) == (r in lost)
    best = json.loads((tmp_path / "out/best.json").read_text())
    assert best and all(r["score"] is not None and r["picture"] for r in best.values())
    files = {f"pictures/{p.name}" for p in (tmp_path / "out/pictures").iterdir()}
    assert files == {r["picture"] for r in found} - {None}
    said = capsys.readouterr().out
    assert f"{len(lost)} pictures came out as no numbers" in said
    assert "it came out as no numbers" in (tmp_path / "out/index.html").read_text()


def test_winners_of_another_score_are_drawn_if_asked(tmp_path, capsys, monkeypatch):
    argv = ["--limit", "3", "--n", "3", "--steps", "3", "--draws", "2", "--out", str(tmp_path)]
    assert rerank.main(rerank.flags(argv)) == 0
    before = rows(tmp_path)
    assert rerank.main(rerank.flags([*argv, "--by", "likelihood"])) == 0
    said = capsys.readouterr().out
    changed = [r for r in before if r["rank"]["likelihood"] == 0 and not r["picture"]]
    assert changed and f"{len(changed)} winners are not drawn: --draw does it" in said
    assert (tmp_path / "index.html").read_text().count("not drawn: --draw") == len(changed)
    with monkeypatch.context() as m:             # they are kept before their words are looked at
        m.setattr(losses, "words", None)
        with pytest.raises(TypeError):
            rerank.main(rerank.flags([*argv, "--by", "likelihood", "--draw", "--words"]))
        m.setattr(Generator, "draw", None)
        assert rerank.main(rerank.flags([*argv, "--by", "likelihood", "--draw"])) == 0
    assert "not drawn" not in (tmp_path / "index.html").read_text()
    generator = Generator.load("miniature", "cpu")
    for r in rows(tmp_path):
        if r["rank"]["likelihood"] == 0:
            drawn = generator.draw([r["caption"]], [r["item"]], 0, steps=3)[0]
            assert (data.open_image(tmp_path / r["picture"]) - drawn).abs().max() < .02


def test_a_folder_of_somebody_else_s_is_left_alone(tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(ValueError, match="holds index.html of no run"):
        run("--limit", 3, out=tmp_path)
    records.claim(tmp_path)                      # another script's lock makes it no run's
    with pytest.raises(ValueError, match="holds index.html of no run"):
        run("--limit", 3, out=tmp_path)
    assert (tmp_path / "index.html").read_text() == "mine"
