"""From names to models: what cannot be loaded, devices, threads, memory, revisions, checkpoints."""
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import devices
import judges
import loading
import script
from captioners import Captioner
from generators import Generator


def run(code, **env):
    """What a process of its own prints; env: more of its environment, None takes a name away."""
    told = os.environ | env
    told = {name: value for name, value in told.items() if value is not None}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=told, capture_output=True,
                         text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout.split()


# ---------------------------------------------------------------- names
def test_nothing_reaches_for_a_network():
    """Everything a default run loads, in a process that was not told to be offline and cannot
    connect."""
    code = """
import socket
def refuse(*a): raise SystemExit(f"connects to {a[1:]}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *a, **k: refuse(*a)
import captioners, generators, judges
captioners.Captioner.load("miniature", "cpu")
generators.Generator.load("miniature", "cpu")
found, absent = judges.load(["clip", "dino", "pixel"], "image", "miniature")
assert sorted(found) == ["clip", "dino", "pixel"] and not absent
found, absent = judges.load(["clip", "sbert"], "text", "miniature")
assert sorted(found) == ["clip", "sbert"] and not absent
"""
    run(code, HF_HUB_OFFLINE=None)


@pytest.mark.parametrize("kind", [Captioner, Generator])
@pytest.mark.parametrize("name", ["vit_b", "./no/such/folder", "/nowhere"])
def test_what_cannot_be_loaded_is_named(kind, name):
    with pytest.raises(ValueError, match=name) as e:
        kind.load(name, "cpu")
    assert "\n" not in str(e.value) and "miniature" in str(e.value)


@pytest.mark.parametrize("kind, name, meant", [
    (Captioner, "minature", "miniature"), (Captioner, "vitB", "vitb"), (Captioner, "blip-2", "blip2"),
    (Generator, "sd-14", "sd14"), (Generator, "Miniature", "miniature")])
def test_what_was_meant_is_named(kind, name, meant):
    with pytest.raises(ValueError, match=f"{name}.*did you mean {meant}\\?$"):
        kind.load(name, "cpu")
    with pytest.raises(ValueError, match="hub id .owner/name.$"):
        kind.load("xyz", "cpu")                  # near to none of them


@pytest.mark.parametrize("fault, line", [("pointer", "is a git-lfs pointer"),
                                         ("cut", "is not a whole safetensors file")])
def test_a_file_that_is_not_whole_is_one_line(tmp_path, fault, line):
    """In a folder of judges, as a model of one file, as a checkpoint."""
    shutil.copytree(ROOT / "miniature/clip", tmp_path / "clip")
    file = tmp_path / "clip/model.safetensors"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n"
    file.write_bytes(pointer if fault == "pointer" else file.read_bytes()[:-1000])
    found, absent = judges.load(["clip", "pixel"], "image", str(tmp_path))
    assert set(found) == {"pixel"} and line in absent["clip"] and "\n" not in absent["clip"]
    for load in (lambda: Generator.load(str(file), "cpu"), lambda: loading.load_trained(file)):
        with pytest.raises(ValueError, match=line) as e:
            load()
        assert "\n" not in str(e.value) and str(file) in str(e.value)


# ---------------------------------------------------------------- scripts
@pytest.mark.parametrize("fault, code, err", [
    (None, 143, ""), (ValueError("a\n  b"), 2, "job.py: a b\n"),
    (OSError("full"), 2, "job.py: full\n")])
def test_a_script_ends_with_one_line(monkeypatch, capsys, fault, code, err):
    """And prints what its terminal cannot show."""
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "argv", ["some/job.py"])
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(script, "ready_to_stop", lambda: None)

    def main(args):
        print(args)
        if fault:
            raise fault
        return 143
    with pytest.raises(SystemExit) as e:
        script.run(main, lambda: "caf\udce9 \u00df")
    terminal.flush()
    assert e.value.code == code and capsys.readouterr().err == err
    assert terminal.buffer.getvalue() == b"caf\\udce9 \\xdf\n"


def test_a_wrong_flag_is_one_line():
    parser = script.Parser("")
    parser.add_argument("--n", type=int)
    assert parser.parse_args(["--n", "3"]).n == 3
    for argv in (["--n", "x"], ["--m"], ["--n"], ["more"]):
        with pytest.raises(ValueError, match=r"\(--help lists the flags\)$") as e:
            parser.parse_args(argv)
        assert "\n" not in str(e.value)


def test_a_folder_without_a_model_is_named(tmp_path):
    for kind in (Captioner, Generator):
        with pytest.raises(ValueError, match=str(tmp_path)):
            kind.load(str(tmp_path), "cpu")


def test_what_a_file_lacks_is_named(tmp_path):
    (tmp_path / "own.py").write_text("class Speaker:\n    speak = None\n"
                                     "def load(device, dtype):\n"
                                     "    Speaker.given = device, dtype\n    return Speaker()\n")
    found = Captioner.load(f"{tmp_path / 'own.py'}:load", "cpu")
    assert found.given == (torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="defines no nothing"):
        Generator.load(f"{tmp_path / 'own.py'}:nothing")
    with pytest.raises(ValueError, match="there is no file"):
        Captioner.load("elsewhere.py:load")


def test_what_is_local(tmp_path):
    for name in ("miniature", str(tmp_path), "elsewhere.py:load"):
        assert loading.is_local(name)
    for name in ("vitb", "sd14", "Salesforce/blip2-opt-2.7b", str(tmp_path / "absent")):
        assert not loading.is_local(name)


def test_judges_come_from_where_the_models_do(tmp_path):
    """The miniature's beside its captioner; of two local models, nothing is fetched."""
    folder, file = str(tmp_path), "gan.py:load"
    assert judges.default_place("miniature", "miniature") == "miniature"
    assert judges.default_place("miniature", "sd14") == "miniature"
    for captioner, generator in ((folder, folder), (folder, "miniature"), (file, folder)):
        assert judges.default_place(captioner, generator) == "cache"
    for captioner, generator in (("vitb", "sd14"), ("vitb", folder), (folder, "sd14"),
                                 ("vitb", "miniature"), ("Salesforce/blip2-opt-2.7b", file)):
        assert judges.default_place(captioner, generator) == "hub"


def test_a_folder_of_judges_is_no_hub_id(tmp_path, monkeypatch):
    """Where judges/clip is absent, no repository of that name is asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judges").mkdir()
    monkeypatch.setattr(loading, "fetch", None)
    found, absent = judges.load(["clip", "pixel"], "image", "judges")
    assert set(found) == {"pixel"} and absent == {"clip": "there is no folder judges/clip"}
    with pytest.raises(ValueError, match="--judges nowhere: it is one of miniature, hub, cache"):
        judges.load(["clip"], "image", "nowhere")


# ---------------------------------------------------------------- this process
def test_every_process_has_its_own_gpu(monkeypatch):
    """torchrun's processes; what is no device and no dtype is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert devices.device_and_dtype("cuda") == (torch.device("cuda"), torch.float16)
    assert not taken
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.device_and_dtype()[0] == torch.device("cuda:3") == taken[-1]
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert devices.device_and_dtype()[0] == torch.device("cuda:2") == taken[-1]
    told = devices.device_and_dtype("cuda:1", "bfloat16")
    assert told == (torch.device("cuda:1"), torch.bfloat16) and len(taken) == 2
    for device, dtype in (("gpu", None), ("cpu", "fp16"), ("cpu", "nn")):
        with pytest.raises(ValueError, match="gpu|fp16|nn"):
            devices.device_and_dtype(device, dtype)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: torch sees no CUDA device"):
        devices.device_and_dtype("cuda")
    assert devices.device_and_dtype("cpu") == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name, told, threads", [("miniature", None, 1), ("miniature", "3", 5),
                                                 ("vitb", None, 5), ("vitb", "3", 5)])
def test_the_miniature_takes_one_thread(name, told, threads):
    """Unless OMP_NUM_THREADS says otherwise; other models keep what there was."""
    code = ("import torch\nfrom miniature import toys\n"
            "torch.set_num_threads(5)\n"
            f"toys.tune_process({name!r})\n"
            "print(torch.get_num_threads(), toys.keep_memory.cache_info().currsize)")
    assert run(code, OMP_NUM_THREADS=told) == [str(threads), str(int(name == "miniature"))]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is asked")
def test_freed_memory_is_kept_for_the_miniature():
    """Page faults of the same allocations: few after the process was tuned for it, unless the
    environment objects."""
    code = """
import resource, torch
from miniature import toys
def faults():
    together = [torch.zeros(2 ** 22) for _ in range(6)]
    del together
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
toys.tune_process(NAME)
torch.set_num_threads(1)
faults()
first = faults()
for _ in range(9):
    last = faults()
print(last - first)
"""
    plain = dict.fromkeys([k for k in os.environ if k.startswith(("MALLOC_", "GLIBC_"))])

    def faults(name, **env):
        return int(run(code.replace("NAME", repr(name)), **plain | env)[0])

    kept = faults("miniature")
    assert kept < faults("miniature", MALLOC_TRIM_THRESHOLD_="131072") / 4


@pytest.mark.parametrize("text", ["[]", "{"])
def test_an_index_of_another_shape_is_one_line(tmp_path, text):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match="captioner") as e:
        loading.resolve(tmp_path, {}, "captioner")
    assert "\n" not in str(e.value)


def test_a_torchvision_that_does_not_fit_is_named(tmp_path):
    """As PyPI's beside a torch of another build: the libraries' own words hide it."""
    package, metadata = tmp_path / "torchvision", tmp_path / "torchvision-0.29.1.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.29.1\n")
    code = ("import captioners, generators, judges\n"
            "for load in (captioners.Captioner.load, generators.Generator.load):\n"
            "    try:\n        load('miniature')\n"
            "    except ValueError as e:\n        print(e)\n"
            "print(judges.load(['clip'], 'image', 'miniature')[1]['clip'])")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                         env=os.environ | {"PYTHONPATH": str(tmp_path)})
    lines = out.stdout.splitlines()
    assert len(lines) == 3, out.stderr
    for line in lines:
        assert "torchvision does not fit this torch" in line and "torchvision::nms" in line


# ---------------------------------------------------------------- revisions
def test_revisions_are_recorded(tmp_path, monkeypatch, capsys):
    file = tmp_path / "out/revisions.jsonl"
    file.parent.mkdir()

    def recorded():
        return [(row["repo"], row["commit"]) for row in loading.records.read_rows(file)]
    monkeypatch.setattr(loading, "REVISIONS", {})
    loading.record_revisions(tmp_path / "out")
    assert not file.exists()                                   # no hub, nothing to say
    loading.REVISIONS["a/b"] = "123"
    loading.record_revisions(tmp_path / "out")
    loading.REVISIONS["c/d"] = "456"
    loading.record_revisions(tmp_path / "out")                 # what came later stands beside it
    loading.REVISIONS.clear()
    loading.REVISIONS["e/f"] = "789"
    loading.record_revisions(tmp_path / "out")                 # nor does another process forget any
    both = [("a/b", "123"), ("c/d", "456"), ("e/f", "789")]
    assert recorded() == both
    loading.REVISIONS.clear()
    loading.record_revisions(tmp_path / "out")                 # a run without the hub forgets none
    assert recorded() == both
    loading.REVISIONS["a/b"] = "789"
    assert capsys.readouterr().err == ""
    loading.record_revisions(tmp_path / "out")                 # another commit is said, and kept
    assert "begun with a/b at 123, goes on with 789" in capsys.readouterr().err
    loading.record_revisions(tmp_path / "out")
    assert recorded() == [*both, ("a/b", "789")]


# ---------------------------------------------------------------- trained weights
def named(side, model, change=1.0):
    return {f"{side}.{name}": p.detach() + change for name, p in model.named_parameters()}


def test_trained_weights_are_put_into_both(tmp_path):
    """A file or its folder; only of the sides that are given; the captioner's side comes too."""
    captioner, generator = Captioner.load("miniature", "cpu"), Generator.load("miniature", "cpu")
    one = dict(list(named("captioner", captioner.model).items())[:3])
    two = dict(list(named("generator", generator.unet).items())[:2])
    header = {"header": json.dumps({"settings": {"side": 48}})}
    save_file(one | two, tmp_path / "checkpoint.safetensors", header)
    own = {name: p.clone() for name, p in captioner.model.named_parameters()}
    assert loading.load_trained(tmp_path, None, generator) == 2
    assert captioner.side is None
    assert loading.load_trained(tmp_path / "checkpoint.safetensors", captioner, None) == 3
    assert captioner.side == 48
    for name, p in captioner.model.named_parameters():
        change = 1.0 if f"captioner.{name}" in one else 0.0
        assert torch.equal(p, own[name] + change)
    unet = dict(generator.unet.named_parameters())
    assert all(torch.equal(unet[k.partition(".")[2]], value) for k, value in two.items())


@pytest.mark.parametrize("fault", ["shape", "name", "no side", "header", "size", "cut", "absent"])
def test_trained_weights_that_do_not_fit_change_nothing(tmp_path, fault):
    captioner = Captioner.load("miniature", "cpu")
    tensors = named("captioner", captioner.model)
    header, last = {}, list(tensors)[-1]
    if fault == "shape":
        tensors[last] = torch.zeros(1, 2, 3)
    elif fault == "name":
        tensors["captioner.nothing"] = torch.zeros(1)
    elif fault == "no side":
        tensors = {name.partition(".")[2]: value for name, value in tensors.items()}
    elif fault == "header":
        header = {"header": "[]"}
    elif fault == "size":
        header = {"header": json.dumps({"settings": {"side": "large"}})}
    file = tmp_path / "checkpoint.safetensors"
    if fault != "absent":
        save_file({name: value.contiguous() for name, value in tensors.items()}, file, header)
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    own = {name: p.clone() for name, p in captioner.model.named_parameters()}
    with pytest.raises(ValueError, match="checkpoint.safetensors") as e:
        loading.load_trained(tmp_path, captioner)
    assert "\n" not in str(e.value)
    assert all(torch.equal(p, own[name]) for name, p in captioner.model.named_parameters())
    assert captioner.side is None
