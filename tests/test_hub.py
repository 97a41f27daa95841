"""Models by their hub ids, from a stand-in of the hub: what is fetched, what is kept, and what
every fault says."""
import builtins
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hub import LARGE, Fault, Hub
from layouts import BLIP2, CLIP, DINO, SBERT, SD14, TAESD, TURBO, VITB, VITL
from PIL import Image

import captioners
import generators
import judges
import loading

PARTS = {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
         "text_encoder/model.safetensors"}
WEIGHTS = {VITB: {"pytorch_model.bin"}, VITL: {"model.safetensors"}, SD14: PARTS, TURBO: PARTS,
           BLIP2: {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"},
           CLIP: {"pytorch_model.bin"}, DINO: {"model.safetensors"}, SBERT: {"model.safetensors"},
           TAESD: {"diffusion_pytorch_model.safetensors"}}
NEVER = re.compile(r"safety_checker|fp16|non_ema|sd_turbo|\.(h5|msgpack|ot|onnx|py|png|jpg|md)$")
STRANGE = re.compile(r"^CONNECT|refs|discussions|convert|commits|telemetry")


@pytest.fixture(scope="module")
def server(layouts, tmp_path_factory):
    root = tmp_path_factory.mktemp("hub") / "repositories"
    shutil.copytree(layouts, root)
    with Hub(root) as hub:
        yield hub
        hub.shutdown()


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The hub in good health, an empty cache; hub.waited has how long nobody slept."""
    server.faults.clear()
    server.log.clear()
    server.waited = []
    server.cache = tmp_path / "cache"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    told(monkeypatch, HF_HUB_CACHE=str(server.cache), HF_TOKEN_PATH=str(tmp_path / "token"),
         HF_HUB_OFFLINE=False, HF_HUB_DISABLE_TELEMETRY=True)
    lies_at(monkeypatch, server.address)
    monkeypatch.setattr(time, "sleep", server.waited.append)
    find = socket.getaddrinfo

    def found(host, *more, **options):
        if host != "127.0.0.1":
            server.log.append(f"CONNECT {host}")
        return find(host, *more, **options)
    monkeypatch.setattr(socket, "getaddrinfo", found)
    return server


def told(monkeypatch, **constants):
    import huggingface_hub
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)


def lies_at(monkeypatch, address):
    files = address + "/{repo_id}/resolve/{revision}/{filename}"
    told(monkeypatch, ENDPOINT=address, HUGGINGFACE_CO_URL_TEMPLATE=files)


def nowhere():
    """An address at which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def captioner(name):
    return captioners.Captioner.load(str(name), "cpu")


def generator(name):
    return generators.Generator.load(str(name), "cpu")


def absent(*names, kind="image"):
    """Why which of them are absent."""
    return judges.load(names, kind, "hub")[1]


def load(name, layouts):
    """A repository by what it is here."""
    if name in (VITB, VITL, BLIP2):
        return captioner(name)
    if name in (SD14, TURBO):
        return generator(name)
    if name == TAESD:
        return generators.tiny_vae("tiny", generator(layouts / SD14))
    judge, kind = {CLIP: ("clip", "image"), DINO: ("dino", "image"), SBERT: ("sbert", "text")}[name]
    assert not absent(judge, kind=kind)
    return None


def refused(load, *words):
    """The one line that comes of it."""
    with pytest.raises(ValueError) as e:
        load()
    line = str(e.value)
    assert "\n" not in line and len(line) < 700
    for word in words:
        assert word in line
    return line


def places(hub, name):
    """Where the line may send somebody for access."""
    return rf"({re.escape(hub.address)}|https://huggingface\.co)/{re.escape(name)}\b"


def weights(found):
    return {name for name in found if name.endswith(LARGE)}


# ---------------------------------------------------------------- what is fetched
@pytest.mark.parametrize("name", WEIGHTS)
def test_only_what_is_needed_comes_and_stays(hub, layouts, monkeypatch, name):
    load(name, layouts)
    found = hub.fetched()
    assert weights(found) == {f"{name}/{file}" for file in WEIGHTS[name]}
    assert not [file for file in found if NEVER.search(file)]
    assert not [line for line in hub.log if STRANGE.search(line)]
    assert sum(line == f"GET /api/models/{name}" for line in hub.log) <= 1
    assert len([line for line in hub.log if "/api/" in line]) <= 4
    told(monkeypatch, HF_HUB_OFFLINE=True)                      # and again without a network
    hub.log.clear()
    load(name, layouts)
    assert not hub.log
    told(monkeypatch, HF_HUB_OFFLINE=False)                     # nor is anything fetched twice
    load(name, layouts)
    assert not weights(hub.fetched())


def test_a_download_says_how_much(hub, layouts, capsys):
    """One line before it: whose, the size of its files, and where they go."""
    captioner("vitb")
    size = sum((layouts / file).stat().st_size for file in hub.fetched()) / 1e6
    line = f"captioner 'vitb': fetching {size:,.1f} MB of {VITB} into {hub.cache}\n"
    assert size > 0 and capsys.readouterr().err.count(line) == 1
    captioner("vitb")
    assert "fetching" not in capsys.readouterr().err


def test_a_network_that_is_gone_is_not_needed_again(hub, layouts, monkeypatch):
    captioner("vitb"), generator("sd14"), load(CLIP, layouts)
    lies_at(monkeypatch, nowhere())
    captioner("vitb"), generator("sd14"), load(CLIP, layouts)
    assert sum(hub.waited) < 10


@pytest.mark.parametrize("name", [VITB, CLIP])
def test_pickled_weights_from_the_hub_and_from_a_folder_are_the_same(hub, layouts, name):
    """Their values, against the file's."""
    truth = torch.load(layouts / name / "pytorch_model.bin", weights_only=True)
    for place in (name, layouts / name):
        if name == VITB:
            own = captioner(place).model.state_dict()
        else:
            folder, options = loading.resolve(place, {}, "judge")
            own = judges.Encoder("clip", folder, "both", "cpu", options).model.state_dict()
        shared = [key for key in own if key in truth]
        assert len(shared) > 60 and all(torch.equal(own[key], truth[key]) for key in shared)


def test_pickled_weights_run_nothing(hub, tmp_path, layouts):
    """A .bin that would touch a file, were it read without restrictions."""
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)
    for folder in (hub.root / "somebody/trap", tmp_path / "trap"):
        shutil.copytree(layouts / VITB, folder)
        torch.save({"text_decoder.cls.predictions.bias": Trap()}, folder / "pytorch_model.bin")
    refused(lambda: captioner("somebody/trap"), "somebody/trap")
    refused(lambda: captioner(tmp_path / "trap"), str(tmp_path / "trap"))
    assert not (tmp_path / "sprung").exists()


def test_safetensors_are_preferred_in_a_folder_too(tmp_path, layouts):
    shutil.copytree(layouts / VITL, tmp_path / "vitl")
    (tmp_path / "vitl/pytorch_model.bin").write_text("not to be read")
    captioner(tmp_path / "vitl")


@pytest.mark.parametrize("kind", ["blip", "no-such-model"])
@pytest.mark.parametrize("where", ["hub", "folder"])
def test_code_beside_a_model_is_never_run(hub, tmp_path, layouts, monkeypatch, where, kind):
    """Nor is anybody asked whether it may be, nor is it fetched."""
    def asked(*words):
        (tmp_path / "asked").touch()
        return "y"
    monkeypatch.setattr(builtins, "input", asked)
    folder = {"hub": hub.root / f"somebody/{kind}", "folder": tmp_path / kind}[where]
    shutil.copytree(layouts / VITL, folder)
    (folder / "canary.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'sang')!r}).touch()\n"
        "from transformers import BertTokenizer as Words, BlipConfig as Config\n"
        "from transformers import BlipForConditionalGeneration as Model\n")
    (folder / "processing.py").write_text((folder / "canary.py").read_text())
    own = {"AutoConfig": "canary.Config", "AutoModelForImageTextToText": "canary.Model",
           "AutoTokenizer": ["canary.Words", None], "AutoProcessor": "processing.Words"}
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        settings = json.loads((folder / file).read_text()) | {"auto_map": own}
        if file == "config.json":
            settings["model_type"] = kind
        (folder / file).write_text(json.dumps(settings))
    name = f"somebody/{kind}" if where == "hub" else str(folder)
    if kind == "blip":
        captioner(name)
    else:
        refused(lambda: captioner(name), name)
    assert not (tmp_path / "sang").exists() and not (tmp_path / "asked").exists()
    assert not [file for file in hub.fetched() if file.endswith(".py")]


@pytest.mark.parametrize("part", ["pipeline", "unet"])
def test_code_beside_a_generator_is_never_run(tmp_path, layouts, monkeypatch, part):
    monkeypatch.setattr(builtins, "input", lambda *words: (tmp_path / "asked").touch() or "y")
    folder = tmp_path / "folder"
    shutil.copytree(layouts / SD14, folder)
    index = json.loads((folder / "model_index.json").read_text())
    code = f"from pathlib import Path\nPath({str(tmp_path / 'sang')!r}).touch()\n"
    if part == "unet":
        code += "from diffusers import UNet2DConditionModel as Canary\n"
        (folder / "unet/canary.py").write_text(code)
        index["unet"] = ["canary", "Canary"]
    else:
        code += "from diffusers import StableDiffusionPipeline as Canary\n"
        (folder / "canary.py").write_text(code)
        index["_class_name"] = ["canary", "Canary"]
    (folder / "model_index.json").write_text(json.dumps(index))
    refused(lambda: generator(folder), str(folder))
    assert not (tmp_path / "sang").exists() and not (tmp_path / "asked").exists()


# ---------------------------------------------------------------- what fails
@pytest.mark.parametrize("files", ["", "safetensors$"])
@pytest.mark.parametrize("kind", ["gated", "refused"])
def test_gated_names_the_page_where_access_is_granted(hub, kind, files):
    for load_it, name in ((captioner, VITL), (generator, SD14)):
        hub.faults[name] = Fault(kind, files)
        line = refused(lambda load_it=load_it, name=name: load_it(name), name)
        assert re.search(places(hub, name), line)
    assert not any(str(code) in line for code in ("Traceback", "HTTPStatusError"))
    hub.faults[CLIP] = Fault(kind, files.replace("safetensors", "bin"))
    missing = absent("clip")
    assert CLIP in missing["clip"] and "\n" not in missing["clip"]


@pytest.mark.parametrize("name", ["Salesforce/blip-image-captioning-bse", "nobody/nothing"])
def test_what_the_hub_does_not_have_is_named(hub, name):
    refused(lambda: captioner(name), name)
    refused(lambda: generator(name), name)
    assert sum(hub.waited) < 10


@pytest.mark.parametrize("files", ["", "safetensors$"])
@pytest.mark.parametrize("status", [429, 500])
def test_a_hub_in_trouble(hub, status, files):
    hub.faults[VITL] = Fault(status, files)
    refused(lambda: captioner("vitl"), "vitl")
    assert sum(hub.waited) < 60
    hub.faults.clear()
    captioner("vitl")


def test_a_download_that_always_breaks_off_keeps_what_came(hub, monkeypatch):
    """Whole files: the client of the hub throws parts of them away."""
    hub.faults[BLIP2] = Fault("drop", "00002-of-00002.safetensors$", size=20_000)
    line = refused(lambda: captioner("blip2"), "blip2")
    assert BLIP2 in line and sum(hub.waited) < 30
    told(monkeypatch, HF_HUB_OFFLINE=True)                      # a part is no model
    refused(lambda: captioner("blip2"), "blip2")
    told(monkeypatch, HF_HUB_OFFLINE=False)
    hub.faults.clear()
    hub.log.clear()
    captioner("blip2")
    assert hub.fetched() == {f"{BLIP2}/model-00002-of-00002.safetensors"}


@pytest.mark.parametrize("name, file", [(BLIP2, "tokenizer.json"), (VITL, "vocab.txt"),
                                        (SD14, "unet/config.json"),
                                        (VITL, "preprocessor_config.json")])
def test_half_a_model_is_not_taken_for_a_whole_one(hub, monkeypatch, name, file):
    """All weights came, a small file did not: the libraries would make up what it says."""
    load_it = generator if name == SD14 else captioner
    hub.faults[name] = Fault(500, f"^{file}$")
    refused(lambda: load_it(name), f"{hub.address}/{name}")
    told(monkeypatch, HF_HUB_OFFLINE=True)
    refused(lambda: load_it(name), name, "HF_HUB_OFFLINE")
    told(monkeypatch, HF_HUB_OFFLINE=False)
    hub.faults.clear()
    load_it(name)


def test_a_download_that_breaks_off_twice_goes_on_by_itself(hub, monkeypatch):
    """From where it stopped."""
    told(monkeypatch, DOWNLOAD_CHUNK_SIZE=10_000)
    for load_it, name, file in ((captioner, VITL, "model.safetensors"),
                                (generator, SD14, "unet/diffusion_pytorch_model.safetensors")):
        hub.faults[name] = Fault("drop", file, size=105_000, times=2)
        load_it(name)
        asked = [line.partition(" from ") for line in hub.log if line.startswith(f"GET /{name}/")]
        assert [at for path, _, at in asked if path.endswith(file)] == ["", "100000", "100000"]


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'5' * 64}\nsize 940101124\n"


@pytest.mark.parametrize("damage", ["cut", "pointer", "empty"])
@pytest.mark.parametrize("name, file", [(VITL, "model.safetensors"), (VITB, "pytorch_model.bin"),
                                        (SD14, "unet/diffusion_pytorch_model.safetensors"),
                                        (VITL, "config.json"), (VITL, "tokenizer.json"),
                                        (SD14, "model_index.json")])
def test_damaged_files_are_one_line(hub, layouts, tmp_path, name, file, damage):
    """Cut in half, a pointer of Git LFS in its place, nothing at all; of the hub or of a folder."""
    body = (layouts / name / file).read_bytes()
    body = {"cut": body[:len(body) // 2], "pointer": POINTER.encode(), "empty": b""}[damage]
    for folder in (hub.root / "somebody" / damage, tmp_path / damage):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(layouts / name, folder)
        (folder / file).write_bytes(body)
    load_it = generator if name == SD14 else captioner
    refused(lambda: load_it(f"somebody/{damage}"), f"somebody/{damage}")
    refused(lambda: load_it(tmp_path / damage), str(tmp_path / damage))


@pytest.mark.parametrize("name, file", [(VITL, "model.safetensors"), (VITL, "config.json"),
                                        (VITL, "tokenizer.json"),
                                        (VITL, "preprocessor_config.json"),
                                        (BLIP2, "model-00002-of-00002.safetensors"),
                                        (SD14, "vae/config.json"), (SD14, "tokenizer/vocab.json"),
                                        (SD14, "unet/diffusion_pytorch_model.safetensors")])
def test_missing_files_are_one_line(layouts, tmp_path, name, file):
    """Of a folder; a BLIP's tokenizer.json alone is no loss, as vocab.txt lies beside it."""
    folder = tmp_path / "folder"
    shutil.copytree(layouts / name, folder)
    (folder / file).unlink()
    for other in folder.rglob("*.bin"):
        other.unlink()
    load_it = generator if name == SD14 else captioner
    if file == "tokenizer.json":
        assert load_it(folder).prompt == captioner(layouts / name).prompt
    else:
        refused(lambda: load_it(folder), str(folder))


def test_offline_with_an_empty_cache(hub, monkeypatch):
    told(monkeypatch, HF_HUB_OFFLINE=True)
    for load_it, name in ((captioner, "vitb"), (generator, "sd14")):
        refused(lambda load_it=load_it, name=name: load_it(name), name)
    missing = absent("clip", "dino", "pixel")
    assert set(missing) == {"clip", "dino"}
    assert not any("\n" in line for line in missing.values())
    assert not hub.log and not hub.waited


def test_no_network_and_an_empty_cache(hub, monkeypatch):
    lies_at(monkeypatch, nowhere())
    for load_it, name in ((captioner, "vitb"), (generator, "sd14")):
        refused(lambda load_it=load_it, name=name: load_it(name), name)
    assert set(absent("clip")) == {"clip"}
    assert sum(hub.waited) < 10


# ---------------------------------------------------------------- the script, in a process
def script(home, address, *argv, **env):
    """rerank.py as somebody calls it whose hub lies at that address: (the process, seconds)."""
    own = ("HF_", "HUGGING", "TRANSFORMERS_", "DISABLE_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    clean |= {"HF_ENDPOINT": address, "HF_HOME": str(home)}
    clean |= {"HTTPS_PROXY": address, "HTTP_PROXY": address, "NO_PROXY": "127.0.0.1"}  # who else?
    command = [sys.executable, "rerank.py", *map(str, argv), "--captioner", "vitb"]
    start = time.monotonic()
    out = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, env=clean | env, text=True,
                         stdin=subprocess.DEVNULL, capture_output=True)
    return out, time.monotonic() - start


def test_the_papers_models_in_a_run_of_their_own(server, tmp_path):
    """vitb, sd14, clip and dino from the hub: a full cycle, and nothing asked beside them."""
    server.faults.clear()
    server.log.clear()
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "picture.png")
    out, _ = script(tmp_path / "home", server.address, tmp_path / "picture.png", "--n", 2,
                    "--scorer", "full", "--steps", 2, "--likeness", "clip", "dino", "--out",
                    tmp_path / "out")
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line)
            for line in (tmp_path / "out/candidates.jsonl").read_text().splitlines()]
    opened = [json.loads(line) for line in (tmp_path / "out/revisions.jsonl").read_text().splitlines()]
    assert {row["repo"] for row in opened} == {VITB, SD14, CLIP, DINO}
    assert len(rows) == 2 and set(rows[0]["scores"]) >= {"clip", "dino", "clipscore"}
    wanted = [f"{name}/{file}" for name in (VITB, SD14, CLIP, DINO) for file in WEIGHTS[name]]
    assert weights(server.fetched()) == set(wanted)
    assert not [file for file in server.fetched() if NEVER.search(file)]
    assert not [line for line in server.log if STRANGE.search(line)]


def test_a_script_says_one_line_and_exits_with_2(server, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    server.faults.clear()
    server.faults[VITB] = Fault("gated")
    out, seconds = script(tmp_path / "home", server.address, tmp_path / "picture.png", "--likeness",
                          "pixel", "--out", tmp_path / "out")
    assert out.returncode == 2 and seconds < 60
    last = out.stderr.strip().splitlines()
    assert len(last) == 1 and last[0].startswith("rerank.py: ") and re.search(places(server, VITB),
                                                                              last[0])
