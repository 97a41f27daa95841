"""The training script, run in process on the miniature: the same training however it is cut, and
nothing lost."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import batches
import bridge
import checkpoints
import data
import devices
import finetune
import losses
import records
import rerank
from captioners import Captioner
from cycle import chance
from generators import Generator
from loading import load_trained
from miniature import world

QUICK = [
    "--batch",
    "4",
    "--probe",
    "0",
    "--held",
    "0",
    "--every",
    "100",
    "--lr",
    "1e-3",
    "--device",
    "cpu",
]


def run(out, *argv):
    """Runs the script; its checkpoint's tensors."""
    code = finetune.main(finetune.flags([*QUICK, "--out", str(out), *map(str, argv)]))
    assert code == 0
    return load_file(out / "checkpoint.safetensors")


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(a, b, within=0.0):
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a) <= within


PLOT = checkpoints.plot


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Drawing takes as long as a step: one test does it."""
    monkeypatch.setattr(checkpoints, "plot", lambda *_: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four undisturbed steps: the reference of all that must come out the same."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(out, "--steps", 4)


# ---------------------------------------------------------------- the same training
def test_a_step_moves_the_queries_of_both_sides(whole, captioner, generator):
    out, tensors = whole
    assert [sum(k.startswith(x) for k in tensors) for x in ("captioner.", "generator.")] == [4, 7]
    for side, model in (("captioner", captioner.model), ("generator", generator.unet)):
        own = dict(model.named_parameters())
        moved = {k: v for k, v in tensors.items() if k.startswith(side)}
        assert all(".crossattention.self.query." in k or ".attn2.to_q." in k for k in moved)
        assert all(
            (v - own[k.partition(".")[2]]).abs().max() > 1e-4
            for k, v in moved.items()
            if k.endswith("weight")
        )
    rows = log(out)
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and all(
        r[k] > 0 for r in rows for k in losses.NAMES
    )
    about = json.loads((out / "checkpoint.json").read_text())
    assert (
        about["step"] == 4
        and about["settings"]["losses"] == list(losses.NAMES)
        and "torch" in about["versions"]
    )


def test_a_resumed_run_is_the_whole_run(whole, tmp_path):
    run(tmp_path, "--steps", 2)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 3}\n{"st')  # what a kill between two checkpoints leaves
    assert same(run(tmp_path, "--steps", 4), whole[1])
    strip = [{k: r[k] for k in (*losses.NAMES, "norm")} for r in log(tmp_path)]
    assert strip == [{k: r[k] for k in (*losses.NAMES, "norm")} for r in log(whole[0])]


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    """Three steps in float64: what Adam makes of the rounding of a gradient near 0 is no fault of
    ours."""
    out = tmp_path_factory.mktemp("double")
    return out, run(out, "--steps", 3, "--dtype", "float64")


def test_micro_batches_and_chunks_change_nothing(double, tmp_path):
    assert same(
        run(tmp_path, "--steps", 3, "--dtype", "float64", "--micro", 1, "--chunk", 2),
        double[1],
        1e-12,
    )


def test_the_cache_changes_nothing(tmp_path, monkeypatch):
    kept = ["--data", ROOT / "miniature/data", "--split", "val", "--steps", 2]
    fresh = run(tmp_path / "fresh", *kept)
    encode, calls = Generator.encode, []

    def counted(*args):
        calls.append(1)
        return encode(*args)
    monkeypatch.setattr(Generator, "encode", counted)
    for name in ("made", "read"):  # the second run finds the folder filled
        assert same(run(tmp_path / name, *kept, "--cache", tmp_path / "latents"), fresh)
        assert len(calls) == 8                                  # two steps of four
    assert len(list((tmp_path / "latents").iterdir())) == 1
    run(tmp_path / "other", *kept[:2], "--split", "test", "--steps", 1, "--cache",
        tmp_path / "latents")
    assert len(list((tmp_path / "latents").iterdir())) == 2     # other pictures: nothing is mixed
    assert len(calls) == 12


def test_two_processes_train_as_one(double, tmp_path):
    out = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port=29517",
            str(ROOT / "finetune.py"),
            *QUICK,
            "--steps",
            "3",
            "--out",
            str(tmp_path),
            "--dtype",
            "float64",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert same(load_file(tmp_path / "checkpoint.safetensors"), double[1], 1e-12)
    assert [r["tg"] for r in log(tmp_path)] == pytest.approx(
        [r["tg"] for r in log(double[0])], rel=1e-6
    )


# ---------------------------------------------------------------- nothing lost
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_line_goes_on(whole, tmp_path, monkeypatch, capsys, number, code):
    """The printed command, typed as it is, ends where an undisturbed run does; it says where it goes on."""
    joint, calls, handler = losses.joint, [], signal.getsignal(number)

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(number)
        return joint(*args)
    monkeypatch.setattr(losses, "joint", interrupted)
    out = tmp_path / "a folder"
    argv = [*QUICK, "--out", str(out), "--steps", "4"]
    monkeypatch.setattr(sys, "orig_argv", ["python3", "finetune.py", *argv])
    assert finetune.main(finetune.flags(argv)) == code and checkpoints.header(out)["step"] == 2
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("finetune.py: stopped after step 2 of 4; this goes on: python finetune.py ")
    python, script, *argv = shlex.split(line.partition("this goes on: ")[2])
    assert finetune.main(finetune.flags(argv)) == 0
    assert same(load_file(out / "checkpoint.safetensors"), whole[1])
    assert f"finetune.py: {out} goes on after step 2, 4 steps of 4 samples in all" in capsys.readouterr().out
    assert signal.getsignal(number) is handler


def test_what_is_finished_is_left(whole, capsys):
    """The same command once more; a larger --steps goes on, as another test shows."""
    out, tensors = whole
    assert same(run(out, "--steps", 4), tensors) and same(run(out, "--steps", 2), tensors)
    assert f"{out} has all 2 steps" in capsys.readouterr().out and len(log(out)) == 4


def test_without_git_a_checkpoint_is_saved(monkeypatch):
    found = checkpoints.commit()
    assert found is None or re.fullmatch("[0-9a-f]{40}", found)
    monkeypatch.setenv("PATH", "/nowhere")
    assert checkpoints.commit() is None


def test_without_a_resource_module(monkeypatch):
    """As on Windows: the module is imported, and says nothing of its memory."""
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.spec_from_file_location("devices_there", devices.__file__)
    there = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "devices_there", there)
    spec.loader.exec_module(there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert there.peak_gib() is None
    assert .1 < devices.peak_gib() < 100


def test_a_prediction_type_without_a_formula_is_told_before_the_work(tmp_path, monkeypatch):
    load = Generator.load

    def loaded(*args):
        generator = load(*args)
        generator.scheduler.register_to_config(prediction_type="flow_prediction")
        return generator
    monkeypatch.setattr(Generator, "load", loaded)
    monkeypatch.setattr(finetune, "train", None)
    with pytest.raises(ValueError, match="prediction_type 'flow_prediction': epsilon, v_prediction"):
        run(tmp_path / "out", "--steps", 1)
    assert [*(tmp_path / "out").glob("[!.]*")] == []


# ---------------------------------------------------------------- what a person looks at
def test_the_losses_are_drawn(tmp_path, monkeypatch, capsys):
    """log.png has the numbers of log.jsonl, gaps left out; without matplotlib there is a line."""
    from matplotlib.figure import Figure
    drawn, savefig = [], Figure.savefig

    def kept(figure, *args, **more):
        drawn.append(figure)
        savefig(figure, *args, **more)
    monkeypatch.setattr(Figure, "savefig", kept)
    monkeypatch.setattr(checkpoints, "plot", PLOT)
    run(tmp_path, "--steps", 4, "--every", 2, "--held", 3, "--thin", 8, "--losses", "tg", "tr")
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
    rows = log(tmp_path)
    for name, axis in zip(("tg", "tr"), drawn[0].axes):
        training, held = axis.lines
        assert axis.get_title() == name
        assert training.get_xydata().tolist() == [[r["step"], r[name]] for r in rows if r[name] is not None]
        assert held.get_xydata().tolist() == [[r["step"], r["held"][name]] for r in rows if "held" in r]
    assert len(drawn[0].axes) == 2 and [r["step"] for r in rows if "held" in r] == [2, 4]
    (tmp_path / "log.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    checkpoints.plot(tmp_path, ["tg"])
    assert not (tmp_path / "log.png").exists() and "no log.png: pip install matplotlib" in capsys.readouterr().out


def test_a_broken_number_stops_and_keeps_the_last_good(tmp_path, monkeypatch):
    run(tmp_path, "--steps", 1)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    joint = losses.joint

    def broken(*args):
        total, each = joint(*args)
        return total * float("nan"), each
    monkeypatch.setattr(losses, "joint", broken)
    with pytest.raises(ValueError, match="step 2: norm is not finite.* keeps step 1"):
        run(tmp_path, "--steps", 3)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_full_disk_loses_nothing_older(tmp_path, monkeypatch):
    run(tmp_path, "--steps", 1)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(ValueError, match="step 2 could not be saved .*No space left.* is whole"):
        run(tmp_path, "--steps", 2)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before and not list(
        tmp_path.glob("*.new")
    )


def test_what_cannot_be_is_told(whole, tmp_path):
    out = whole[0]
    for match, argv in {
        "was trained otherwise .*lr was .0.001., is .0.5.": ("--steps", 8, "--lr", 0.5),
        "bridge was 'anchored', is 'plain'": ("--steps", 8, "--bridge", "plain"),
    }.items():
        with pytest.raises(ValueError, match=match):
            run(out, *argv)
    with pytest.raises(ValueError, match="there is nothing to train"):
        run(tmp_path, "--losses", "tg", "--unfreeze", "none", "q", "--steps", 1)
    (tmp_path / "cut.safetensors").write_bytes((out / "checkpoint.safetensors").read_bytes()[:99])
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        load_trained(tmp_path / "cut.safetensors")
    for argv in (["--weights", "1", "2"], ["--captioner", "vitb"], ["--batch", "0"],
                 ["--batch", "x"], ["--what"], ["--lr", "1", "2", "3"]):
        with pytest.raises(ValueError, match="--"):
            finetune.flags(argv)


# ---------------------------------------------------------------- what somebody else wrote
def reheaded(whole, folder, settings):
    """A copy of the checkpoint whose header has other settings: what a download may hold."""
    about = checkpoints.header(whole[0])
    about["settings"] |= settings
    folder.mkdir(parents=True, exist_ok=True)
    save_file(whole[1], folder / "checkpoint.safetensors", {"header": json.dumps(about)})
    return folder


def refused(capfd, out, *argv):
    """The one line of the script as it is called, exit code 2."""
    code = subprocess.run([sys.executable, str(ROOT / "finetune.py"), *QUICK, "--out", str(out),
                           *map(str, argv)]).returncode
    err = capfd.readouterr().err
    assert code == 2 and len(err.splitlines()) == 1, err
    return err


@pytest.fixture
def evil(tmp_path):
    """(file.py:function, the canary that is there once that code has run)."""
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\ndef load(*_): raise OSError\n")
    return f"{tmp_path}/evil.py:load", canary


@pytest.mark.parametrize("side", ["captioner", "generator"])
def test_a_header_runs_no_code(whole, tmp_path, evil, side, capfd):
    name, canary = evil
    out = reheaded(whole, tmp_path / "out", {side: name})
    assert f"{side} was {name!r}, is 'miniature'" in refused(capfd, out, "--steps", 8)
    with pytest.raises(ValueError, match=f"{side} was '.*', is 'miniature'"):
        run(out, "--export", tmp_path / "stock")
    assert not canary.exists() and not (tmp_path / "stock").exists()
    argv = ["--out", str(out), "--export", str(tmp_path / "stock"), f"--{side}", name]
    with pytest.raises(ValueError, match=f"{side} files was None"):      # nor was it trained by this file
        finetune.main(finetune.flags(argv))
    assert not canary.exists()


@pytest.mark.parametrize("settings", [
    {"captioner": "some/body"}, {"generator": "/some/dir"}, {"decoder": "some/tiny"}, {"split": "../../x"},
    {"losses": ["tg", "xx"]}, {"losses": "tg"}, {"batch": 8.0}, {"lr": [float("nan")]}, {"lr": []},
    {"side": {}}, {"weights": ["1"]}, {"captioner": ["miniature"]}, {"captioner": None}, {"seed": None},
    {"captioner": "x\x1b[2J" + 900 * "y"}, {"bridge": {"a": [1]}}, {"unfreeze": ["q"]}])
def test_settings_are_compared_and_not_followed(whole, tmp_path, settings):
    """In one line that can be printed; settings that no flag has are nothing to us."""
    out = reheaded(whole, tmp_path / "out", settings | {"out": "/tmp/x", "data": "a b/$(id)", "": 1})
    with pytest.raises(ValueError, match="was trained otherwise") as e:
        run(out, "--steps", 8)
    key, = settings
    assert f"({key} was " in str(e.value) and str(e.value).isprintable() and len(str(e.value)) < 600


def test_a_model_may_have_moved(tmp_path):
    """Its files are what counts; nothing else of another name is the same."""
    before = {"captioner": "a/", "captioner files": "1", "generator": "miniature"}
    checkpoints.check_same(tmp_path, before, before | {"captioner": "/b"})
    for change in ({"captioner": "/b", "captioner files": "2"}, {"generator": "sd14"}):
        with pytest.raises(ValueError, match="was trained otherwise"):
            checkpoints.check_same(tmp_path, before, before | change)


def test_a_header_that_is_none(whole, tmp_path):
    for text in ("{", "[]", "{}", "3", '{"step": "1", "data": "", "settings": {}}'):
        save_file(whole[1], tmp_path / "checkpoint.safetensors", {"header": text})
        with pytest.raises(ValueError, match="no checkpoint of a run"):
            run(tmp_path, "--steps", 8)
    for text in ("{", "[]", '{"settings": {"side": "x"}}', '{"settings": 3}'):
        save_file(whole[1], tmp_path / "checkpoint.safetensors", {"header": text})
        with pytest.raises(ValueError, match="its header"):
            load_trained(tmp_path)


def test_a_run_of_a_folder_goes_on_where_it_is(tmp_path):
    """The set may have moved, another one is refused; latents lie where the command line says."""
    first, moved = tmp_path / "set", tmp_path / "elsewhere"
    for folder in (first, moved):
        shutil.copytree(ROOT / "miniature/data/near", folder)
        rows = [json.dumps({"file_name": p.name, "text": "a ball"})
                for p in sorted(folder.glob("*.png"))]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    argv = ["--data", first, "--own", first]
    tensors = run(tmp_path / "whole", *argv, "--steps", 2)
    run(tmp_path / "out", *argv, "--steps", 1, "--cache", tmp_path / "latents")
    more = ["--data", moved, "--own", moved, "--cache", tmp_path / "new"]
    assert same(run(tmp_path / "out", *more, "--steps", 2), tensors)
    with pytest.raises(ValueError, match="trained otherwise .data was"):
        run(tmp_path / "out", *more, "--own", "val", "--steps", 3)
    said = (first / "metadata.jsonl").read_text()
    (moved / "metadata.jsonl").write_text(said.replace("ball", "box"))
    with pytest.raises(ValueError, match="trained otherwise .data was"):
        run(tmp_path / "out", *more, "--steps", 3)


def test_a_checkpoint_without_a_tensor_for_us(whole, captioner, tmp_path):
    """A foreign file is refused by all who take one; one of the other side alone is not."""
    before = {k: v.clone() for k, v in captioner.model.state_dict().items()}
    alien = tmp_path / "alien"
    alien.mkdir()
    about = {"header": json.dumps(checkpoints.header(whole[0]))}
    save_file({"unet.conv_in.weight": torch.ones(2)}, alien / "checkpoint.safetensors", about)
    with pytest.raises(ValueError, match="none of its 1 tensors is named captioner"):
        load_trained(alien, captioner)
    with pytest.raises(ValueError, match="none of its 1 tensors"):
        finetune.main(finetune.flags(["--out", str(alien), "--export", str(tmp_path / "stock")]))
    assert not (tmp_path / "stock").exists()
    with pytest.raises(ValueError, match="alien has no captioner"):
        run(alien, "--steps", 8)
    ours = {k: v for k, v in whole[1].items() if k.startswith("generator.")}
    save_file(ours, alien / "checkpoint.safetensors", about)
    assert load_trained(alien, captioner) == 0
    assert all(torch.equal(v, before[k]) for k, v in captioner.model.state_dict().items())
    with pytest.raises(ValueError, match="is not of this generator"):      # one without a unet
        load_trained(alien, None, object())


# ---------------------------------------------------------------- pictures nobody described
def test_own_words(tmp_path, captioner, generator):
    """ir of the first step by hand: what the captioner says of the pictures, across the bridge,
    into the UNet."""
    tensors = run(tmp_path / "own", "--own", "all", "--losses", "tg", "ir", "--steps", 1)
    assert {k.split(".")[0] for k in tensors if not k.startswith("adam")} == {"captioner"}
    run(tmp_path / "tg", "--losses", "tg", "--steps", 1)
    ours, alone = log(tmp_path / "own")[0], log(tmp_path / "tg")[0]
    assert ours["tg"] == pytest.approx(
        alone["tg"], rel=1e-6
    )  # the described samples are the same ones
    plain = load_file(tmp_path / "tg/checkpoint.safetensors")
    assert not same(
        {k: v for k, v in tensors.items() if "adam" not in k},
        {k: v for k, v in plain.items() if "adam" not in k},
        1e-5,
    )
    wide = ["--own", "all", "--losses", "tg", "ir", "--steps", 1, "--dtype", "float64"]
    assert same(run(tmp_path / "cut", *wide, "--micro", 1), run(tmp_path / "uncut", *wide), 1e-12)
    rows = torch.randperm(20_000, generator=chance("own", 0, 0))[:4].tolist()
    crossing = bridge.Bridge(
        captioner.tokenizer,
        generator.tokenizer,
        generator.text_encoder.get_input_embeddings().weight,
        len(captioner.head.weight),
        begin=captioner.prompt[0],
    )
    want = []
    for i in rows:
        image = (
            torch.from_numpy(world.draw(world.sample("all", i)).copy()).permute(2, 0, 1)[None] / 255
        )
        said = captioner.speak(image, 1, items=[[0, i]])[0][0]
        g = chance("own", 0, 0, i)
        t, _ = torch.randint(1000, (), generator=g), torch.rand((), generator=g)
        noise = torch.randn(2, 8, 8, 8, generator=g)
        with torch.no_grad():
            r = captioner.read(image, said)
            layout = crossing.layout(said, captioner.lead)
            soft = crossing(r.hidden, r.weight, r.bias, layout)[0]
            states = bridge.soft_states(generator.text_encoder, soft, layout.target)
            mean, std = generator.encode(image)
            x, a = mean + std * noise[:1], generator.scheduler.alphas_cumprod[t]
            out = generator.predict(a.sqrt() * x + (1 - a).sqrt() * noise[1:], t[None], states)
            want.append((out - (a.sqrt() * noise[1:] - (1 - a).sqrt() * x)).square().mean().item())
    assert ours["ir"] == pytest.approx(sum(want) / 4, rel=1e-4)


def test_own_words_teach_the_captioner_alone(tmp_path):
    """What the generator is taught does not hang on them, and they may come from a folder without
    captions."""
    for name, argv in {"own": ["--losses", "ir", "ig", "--own", ROOT / "miniature/data/near"],
                       "ig": ["--losses", "ig"]}.items():
        run(tmp_path / name, *argv, "--steps", 2, "--clip", 0)
    own, ig = (load_file(tmp_path / k / "checkpoint.safetensors") for k in ("own", "ig"))
    assert same({k: own[k] for k in ig}, ig, 1e-7) and len(own) > len(ig)
    with pytest.raises(ValueError, match="not among --losses"):
        finetune.flags(["--own", "all", "--losses", "tg"])


def test_weights_follow_their_losses():
    args = finetune.flags(["--losses", "ir", "tg", "--weights", "10", "1"])
    assert dict(zip(args.losses, args.weights)) == {"tg": 1, "ir": 10} and args.losses == [
        "tg",
        "ir",
    ]
    with pytest.raises(ValueError, match="--own photoz: no such folder"):
        finetune.flags(["--own", "photoz"])


def test_a_learning_rate_for_each_side(tmp_path):
    one = run(tmp_path / "one", "--steps", 1)
    two = run(tmp_path / "two", "--steps", 1, "--lr", 1e-3, 0)
    assert same({k: v for k, v in one.items() if k.startswith("captioner.")},
                {k: v for k, v in two.items() if k.startswith("captioner.")})
    own = dict(Generator.load("miniature", "cpu").unet.named_parameters())
    assert all(
        torch.equal(v, own[k.removeprefix("generator.")])
        for k, v in two.items()
        if k.startswith("generator.")
    )


# ---------------------------------------------------------------- settings
def test_losses_reach_only_their_own_side(tmp_path):
    for name, side in (("tg", "captioner"), ("ig", "generator")):
        keys = run(tmp_path / name, "--losses", name, "--steps", 1).keys()
        assert keys and {
            k.removeprefix("adam.exp_avg.").removeprefix("adam.exp_avg_sq.").split(".")[0]
            for k in keys
        } == {side}


@pytest.mark.parametrize("which, parts", [(["kv", "none"], {"key", "value"}),
                                          (["none", "qkv"], {"to_q", "to_k", "to_v"})])
def test_unfreeze(which, parts, tmp_path):
    keys = run(tmp_path, "--unfreeze", *which, "--steps", 1).keys()
    assert {k.split(".")[-2] for k in keys} == parts


def test_half_precision_trains_in_float32(tmp_path):
    """Frozen weights in bfloat16; what is trained, its moments and the losses stay wide, and come
    out near."""
    tensors = run(tmp_path / "half", "--steps", 2, "--dtype", "bfloat16", "--checkpointing")
    assert {v.dtype for v in tensors.values()} == {torch.float32}
    run(tmp_path / "wide", "--steps", 2)
    for a, b in zip(log(tmp_path / "half"), log(tmp_path / "wide")):
        assert [a[k] for k in losses.NAMES] == pytest.approx([b[k] for k in losses.NAMES], rel=.1)


def test_checkpointing_changes_nothing(whole, tmp_path):
    assert same(run(tmp_path, "--steps", 4, "--checkpointing"), whole[1], 1e-6)


def test_thin_and_probe(tmp_path):
    run(tmp_path, "--steps", 6, "--thin", 16, "--probe", 3, "--weights", 1, 1, 1, 2)
    rows = log(tmp_path)
    assert [r["tr"] is None for r in rows].count(True) >= 2 and any(r["tr"] for r in rows)
    assert [r["step"] for r in rows if "norm_ir" in r] == [1, 4]
    first = rows[0]
    assert (
        first["norm_tg"]["captioner"] > 0 == first["norm_tg"]["generator"]
        and first["norm_ir"]["captioner"] > 0
    )


def test_held_out_losses_are_those_of_the_models(tmp_path, captioner, generator, capsys):
    """Before and after, of the same samples under the same chance; tg against a plain reading of
    the val split."""
    run(tmp_path, "--steps", 2, "--every", 1, "--held", 6, "--lr", 1e-2, "--losses", "tg", "ig")
    rows = log(tmp_path)
    first = dict(
        zip(("tg", "ig"), map(float, re.findall(r"(?:tg|ig) ([\d.]+) ->", capsys.readouterr().out)))
    )
    assert rows[0]["held"] != rows[1]["held"] and set(rows[0]["held"]) == {"tg", "ig"}
    want = []
    for i, item in enumerate(data.read("miniature", "val")[:6]):
        said = item.captions[torch.randint(5, (), generator=chance("finetune", 0, -1, i))]
        want.append(
            losses.caption_loss(captioner.read([data.open_image(item.path)], [said])).item()
        )
    assert first["tg"] == pytest.approx(sum(want) / 6, abs=1e-4)


def test_a_tiny_decoder_takes_the_exact_ones_place(whole, tmp_path):
    from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    tiny = {
        "latent_channels": 8,
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
    }
    AutoencoderTiny(**tiny).save_pretrained(tmp_path / "tiny")
    run(tmp_path / "out", "--steps", 1, "--decoder", tmp_path / "tiny")
    ours, exact = log(tmp_path / "out")[0], log(whole[0])[0]
    assert (
        ours["ig"] == pytest.approx(exact["ig"]) and ours["tr"] > exact["tr"] + 0.5
    )  # random: it draws mud
    AutoencoderTiny(**tiny | {"latent_channels": 4}).save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match="4 latent channels, the generator has 8"):
        run(tmp_path / "no", "--steps", 1, "--decoder", tmp_path / "four")


def test_what_fits_24_gb():
    """The readings of `bench.py real`, by which finetune.py takes four samples of BLIP-2 at once,
    and README speaks."""
    read = {
        k: v["GiB reserved"]
        for k, v in json.loads((ROOT / "lab/results/real.json").read_text())["real"].items()
    }
    assert read["blip2 --micro 8"] > 24 and all(
        read[k] < 23 for k in ("blip2", "vitl", "vitb", "vitb --chunk 2")
    )
    assert read["vitb --micro 2"] < 11 and read["vitb --checkpointing"] < 11


def test_a_blip2_trains_its_query_tokens_and_nothing_else(blip2, tmp_path, monkeypatch):
    kept, load = [], Captioner.load
    monkeypatch.setattr(Captioner, "load", lambda *a: kept.append(load(*a)) or kept[-1])
    tensors = run(
        tmp_path,
        "--captioner",
        blip2,
        "--generator",
        "miniature",
        "--data",
        "miniature",
        "--steps",
        1,
    )
    assert [k for k in tensors if k.startswith("captioner.")] == ["captioner.query_tokens"]
    before, after = load(blip2, "cpu").model.state_dict(), kept[0].model.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == ["query_tokens"]
    assert all(log(tmp_path)[0][k] > 0 for k in losses.NAMES)
    wide = [
        "--captioner",
        blip2,
        "--generator",
        "miniature",
        "--data",
        "miniature",
        "--steps",
        1,
        "--side",
        42,
    ]
    run(tmp_path / "wide", *wide)
    assert log(tmp_path / "wide")[0]["tg"] != log(tmp_path)[0]["tg"] and kept[1].side == 42
    assert kept[1].micro == 4                    # 24 GB: see above
    ours = load(blip2, "cpu")
    load_trained(tmp_path / "wide", ours)
    assert ours.pixels(torch.zeros(1, 3, 9, 9)).shape[-1] == 42  # and where it is used, likewise
    with pytest.raises(ValueError, match="--side is for BLIP-2"):
        run(tmp_path / "no", "--side", 64, "--steps", 1)
    with pytest.raises(ValueError, match="query tokens are trained: q or none"):
        run(
            tmp_path / "kv",
            "--captioner",
            blip2,
            "--generator",
            "miniature",
            "--data",
            "miniature",
            "--steps",
            1,
            "--unfreeze",
            "kv",
            "q",
        )


def test_pictures_of_a_folder_and_a_broken_one(images, tmp_path, capsys):
    folder = tmp_path / "set"
    for i in range(5):
        data.save_image(images[i], folder / f"{i}.png")
    (folder / "3.png").write_text("no picture")
    rows = [
        {"file_name": f"{i}.png", "text": f"a {c} ball"}
        for i, c in enumerate(("red", "blue", "pink", "green"))
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records.say.cache_clear()
    run(tmp_path / "out", "--data", folder, "--split", "all", "--steps", 3)
    err = capsys.readouterr().err
    assert err.count("3.png is not a picture") == 1
    assert f"finetune.py: 1 of the 5 pictures of {folder}, all, have no caption and are left out\n" in err
    assert "all: 4 pictures" in checkpoints.header(tmp_path / "out")["data"]


def test_a_share_of_a_folder_is_held_out(images, tmp_path, capsys):
    """By the rule of data.read: no picture of them is trained on, neither with its caption nor as one
    that nobody described; where all are, that is said."""
    for i in range(40):
        data.save_image(images[i % 6], tmp_path / f"set/{i}.png")
        (tmp_path / f"set/{i}.txt").write_text("a ball")
    folder = str(tmp_path / "set")
    expected = {x.name for x in data.read(folder, "val")}
    training, own, _ = batches.open_samples(folder, "train", folder, 4)
    held = batches.held_out(folder, 64, [training, own])
    assert own.items == training.items and len(training) + len(held) == 40
    assert {x.name for x in held.items} == expected and 1 < len(held) < 10
    assert len(batches.held_out(folder, 2, [training])) == 2
    run(tmp_path / "out", "--data", folder, "--steps", 1, "--losses", "tg", "--held", 64)
    said = capsys.readouterr().out
    assert f"{len(held)} held-out samples" in said and log(tmp_path / "out")[0]["held"]["tg"] > 0
    records.say.cache_clear()
    own = batches.Samples(folder, "val", described=False)
    for trained in ([batches.Samples(folder, "all")], [training, own]):
        assert batches.held_out(folder, 64, trained) is None
    said = capsys.readouterr().err
    assert f"finetune.py: nothing is held out: all of {folder}, val, is trained on\n" in said
    records.say.cache_clear()
    (tmp_path / "set/train").mkdir()
    (tmp_path / "set/0.png").rename(tmp_path / "set/train/0.png")
    (tmp_path / "set/test").mkdir()
    (tmp_path / "set/1.png").rename(tmp_path / "set/test/1.png")
    assert batches.held_out(folder, 64, [training]) is None
    assert "nothing is held out: " in capsys.readouterr().err
    assert batches.held_out(folder, 0, [training]) is None and not capsys.readouterr().err


# ---------------------------------------------------------------- and after
def test_the_export_is_stock_and_says_the_same(whole, captioner, tmp_path, images):
    from diffusers import StableDiffusionPipeline
    from transformers import AutoProcessor, BlipForConditionalGeneration
    out = whole[0]
    assert finetune.main(finetune.flags(["--export", str(tmp_path), "--out", str(out)])) == 0
    stock = BlipForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "generator", low_cpu_mem_usage=False)
    assert stock.dtype == pipe.dtype == torch.float32 and AutoProcessor.from_pretrained(
        tmp_path / "captioner"
    )
    ours, drawer = Captioner.load("miniature", "cpu"), Generator.load("miniature", "cpu")
    assert load_trained(out, ours, drawer) == 11
    reading, said = (
        ours.read(images[:2], ["a red ring", "a blue box"]),
        captioner.read(images[:2], ["a red ring"] * 2),
    )
    exported = Captioner.load(tmp_path / "captioner", "cpu").read(
        images[:2], ["a red ring", "a blue box"]
    )
    assert torch.equal(reading.hidden, exported.hidden)
    assert (
        reading.hidden[0] - said.hidden[0, : reading.hidden.shape[1]]
    ).abs().max() > 1e-3  # it was trained
    x, t, c = torch.randn(1, 8, 8, 8), torch.tensor([500]), drawer.states(["a red ring"])
    with torch.no_grad():
        assert torch.equal(pipe.unet(x, t, c).sample, drawer.predict(x, t, c))


def test_readmes_lines_load_an_export(whole, tmp_path, monkeypatch, capsys, images):
    """They print the prompt and what our own captioner says; without the prompt, nothing."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    lines, = (block for block in blocks if "out/models" in block)
    monkeypatch.chdir(tmp_path)
    assert finetune.main(finetune.flags(["--export", "out/models", "--out", str(whole[0])])) == 0
    data.save_image(images[0], tmp_path / "photo.png")
    (tmp_path / "photo.png").rename("photo.jpg")
    said = Captioner.load("out/models/captioner", "cpu").speak(images[:1], 1, "beam")[0][0][0]
    for prompt, printed in (('text="a picture of", ', f"a picture of {said}\n"), ("", "\n")):
        capsys.readouterr()
        exec(lines.replace('text="a picture of", ', prompt), {})
        assert capsys.readouterr().out == printed


def test_rerank_takes_a_checkpoint(whole, tmp_path):
    argv = ["--limit", "1", "--n", "2", "--steps", "2", "--likeness", "pixel", "--device", "cpu"]
    rows = []
    for name, more in (("before", []), ("after", ["--ckpt", str(whole[0])])):
        assert rerank.main(rerank.flags([*argv, "--out", str(tmp_path / name), *more])) == 0
        rows.append(
            [json.loads(x) for x in (tmp_path / name / "candidates.jsonl").read_text().splitlines()]
        )
    before, after = ([row["scores"]["likelihood"] for row in group] for group in rows)
    assert before != after
    with pytest.raises(ValueError, match="ckpt was"):
        rerank.main(rerank.flags([*argv, "--out", str(tmp_path / "after")]))
