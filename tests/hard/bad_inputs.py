"""The bad inputs: python tests/hard/suite.py inputs [WORD ...]     (cases whose name holds all words)

A new input is a line: of RANGES (a flag's values), of SHAPES (a key's values in a JSON file), or a
call of `case` (kind, name, what is typed, what is expected, {file: what it is made of}). Words of
`files` that name a finished run of trial.DONE are copies of it.
"""
# ruff: noqa: I001
import itertools
import json
import os

from make import (DROP, PAYLOAD, TEXT, TEXTS, all_nan, blip, changed, copy, cut, draws, each, edit, fifo, flipped, folder, gone, head,
                  imagefolder, karpathy, link, long_header, nocaps, noise, pickled, picture, pictures, scene, secret, speaks,
                  tensors, without)
from trial import (Case, closed, either, exactly, exhausted, met, no_formula, no_programs, no_work, plain_files, plain_page, refused,
                   same_steps, skipped, taken, unchanged)

CASES = []
COCO, NOCAPS, BLIP = "set/dataset_coco.json", "set/nocaps_val_4500_captions.json", "set/coco_karpathy_test.json"
META, ROWS, OLD = "set/metadata.jsonl", "o/candidates.jsonl", "o/settings.json"
CKPT = "o/checkpoint.safetensors"
O = "o:|o/|o was|o has|o holds"                  # how a message names the folder
M = "rerank a.png --captioner m --generator miniature --judges miniature"
MPY = "rerank a.png b.png --captioner m.py:load --generator miniature --judges miniature"


def case(kind, name, argv, expected, files=None, **more):
    CASES.append(Case(kind, f"{kind}: {name}", argv, expected, files or {}, **more))


def after(files, name, change):
    """Files, of which one is changed once it is made."""
    return files | {name: (files[name], change) if name in files else change}


# ---------------------------------------------------------------- flags: values out of range
RANGES = """
rerank --limit 0 -1 x 1.5
rerank --n 0 -1 1000000000 x
rerank --batch 0 -1
rerank --draws 0 -1 1000000000
rerank --steps -1 1000000 x
rerank --guidance nan inf x
rerank --seed x 1.5
rerank --device cpu:x mps cuda:7 gpu meta
rerank --dtype float8 int64 bool x
rerank --way nonsense
rerank --likeness nonsense
rerank --by clpi
rerank --scorer ful
rerank --split tets
rerank --glove nothing.txt
rerank --captioner minature vit-b "" a/b/c nothing/ blip.safetensors
rerank --generator minature sd41 a/b/c a.png
rerank --data minature a.png
rerank --ckpt nothing a.png set
rerank --judges nonsense
rerank --out a.png a.png/x ""
evaluate --limit 0 -1 x
evaluate --batch 0 -1
evaluate --steps 0 -1 1000000
evaluate --guidance nan inf
evaluate --device cpu:x mps cuda:7
evaluate --dtype float8 int64
evaluate --way nonsense
evaluate --split tets
evaluate --glove nothing.txt
evaluate --inception nothing.pth a.png
evaluate --judges nonsense
evaluate --ckpt nothing
score --findings nothing
evaluate --out a.png
finetune --steps 0 -1 x
finetune --batch 0 -1 1000000
finetune --lr -1 nan inf x
finetune --clip -1 nan
finetune --held -1
finetune --probe -1
finetune --every 0 -1
finetune --thin 0 -1
finetune --micro 0 -1
finetune --chunk 0 -1
finetune --side 0 -1
finetune --weights nan -1 inf
finetune --device cpu:x mps cuda:7
finetune --dtype float8 int64
finetune --losses tgg
finetune --split tets
finetune --decoder nonsense
finetune --own nothing
finetune --cache a.png
finetune --out a.png
finetune --unfreeze q
finetune --bridge plian
"""
for line in RANGES.strip().splitlines():
    script, flag, *values = line.split()
    for value in (v.strip('"') for v in values):
        rest = ["--data", "set"] if script == "finetune" and flag != "--steps" else []
        argv = [script, *rest, *["a.png"] * (script == "rerank" and flag == "--captioner"), flag, value]
        if flag == "--weights":
            argv += ["--losses", "tg"]
        told = flag if len(value) < 4 else f"{flag}|{value}"
        nearest = {"minature": "miniature", "sd41": "sd14", "plian": "plain"}.get(value, "")
        expected = either if value == "nonsense" else refused
        case("flags", f"{script} {flag} {value or 'of nothing'}", argv, expected(told, nearest))
for value in ("0", "-1", "nan", "inf", "x"):
    case("flags", f"finetune --epochs {value}", f"finetune.py --data set --batch 2 --out o --epochs {value}", refused("--epochs"))
for value in ("-1", "nan"):
    case("flags", f"rerank --margin {value}", f"rerank a.png --pairs trl --margin {value}", refused("--margin"))
for value in ("0", "-1", "x"):
    case("flags", f"label-free --draws {value}", f"score --labelfree --images set --captions c.json --draws {value}", refused("--draws"),
         {"c.json": {"0": "a ring"}})
for script in ("rerank", "finetune", "evaluate", "data.py", "bridge.py"):
    case("flags", f"{script}: an unknown flag", [script, "--nonsense"], refused("--help"))
    case("flags", f"{script}: a flag without its value", [script, {"bridge.py": "--source", "data.py": "--root"}.get(script, "--data")], refused("--help"))

# ---------------------------------------------------------------- flags that do nothing here
MODES = """
rerank a.png --decoder tiny
cycle a.png --draws 3
rerank a.png --margin .1
rerank a.png --turn text
rerank a.png --split val
rerank 'a red ring' --way beam
rerank 'a red ring' --pairs trl
rerank a.png --pairs diffusion
score --findings o --score c.json --refs r.json
score --labelfree --images set --captions c.json --score c.json --refs r.json
evaluate --refs r.json
evaluate --images set
evaluate --captions c.json
evaluate --draws 3
score --only captions --score c.json --refs r.json
score --ckpt o --score c.json --refs r.json
score --compare c.json c.json
score --score c.json
score --labelfree --images set
given --captions w.json --way beam
given --captions w.json --n 3
given --captions w.json --images w.json
given --captions w.json a.png
finetune --decoder tiny --losses tg
finetune --thin 2 --losses tg
finetune --own set --losses tg
finetune --side 64
finetune --weights 1 1 --losses tg
"""
for line in MODES.strip().splitlines():
    flag = {"score --findings": "--score"}.get(" ".join(line.split()[:2]), None)
    flag = flag or next(word for word in line.split() if word.startswith("--"))
    case("modes", line, line, refused(flag, then=no_work), {"c.json": {"0": "a ring"}, "r.json": {"0": ["a ring"]}, "w.json": {"a.png": ["a ring", "a wall"]}})
case("modes", "rerank --steps 0 --scorer full", "cycle a.png --steps 0", refused("--steps", then=no_work))
case("modes", "rerank --by clip before the work", "rerank a.png --by clip", refused("--by clip", then=no_work))
case("modes", "rerank pictures and sentences", ["rerank", "a.png", "a red ring"], refused("a.png", then=no_work))
case("modes", "rerank a missing folder", "rerank holiday/", refused("holiday/"))
case("modes", "rerank a file of another kind", "rerank notes.md", refused("notes.md"), {"notes.md": "a red ring"})
case("modes", "rerank a mistyped picture", "rerank photo.jpgg", refused("photo.jpgg"))

# ---------------------------------------------------------------- JSON of the wrong shape
SHAPES = [
    ("set/dataset_coco.json", "rerank --data set", karpathy, {
        "": [[], None, "x", 7], "images": [DROP, None, 7, "x", {}, []], "images 0": [None, 7, "x", []],
        "images 0 split": [DROP, []], "images 0 filename": [DROP, None, 7, []], "images 0 cocoid": [[], {}],
        "images 0 filepath": [None, 7], "images 0 sentences": [DROP, None, 7, "x", {}],
        "images 0 sentences 0": [None, "x", 7], "images 0 sentences 0 raw": [DROP, None, 7, []]}),
    (BLIP, "rerank --data set", blip, {
        "": [{}, None, "x"], "0": [None, 7, "x", []], "0 image": [DROP, None, 7, []], "0 caption": [DROP, None, 7, {}, [7], [None]]}),
    (NOCAPS, "rerank --data set", nocaps, {
        "": [[], None], "annotations": [DROP, None, {}, 7], "annotations 0": [None, "x"], "annotations 0 image_id": [DROP, []],
        "annotations 0 caption": [DROP, None, 7], "images": [DROP, None, 7], "images 0": [None], "images 0 id": [DROP, []],
        "images 0 file_name": [DROP, None, 7]}),
    (NOCAPS, "rerank --data set --split in", nocaps, {"images 0 domain": [DROP, []]}),
    (META, "rerank --data set --split all", imagefolder, {
        "0": [[], 7, None], "0 file_name": [DROP, 7, [], None], "0 text": [DROP, 7, None, [7], {}]}),
    ("c.json", "score --score c.json --refs r.json", [{"image_id": 1, "caption": "a ring"}], {
        "": [None, 7, "x", [], {}], "0": [None, 7, "x", []], "0 image_id": [DROP, [], None], "0 caption": [DROP, None, 7, [], [7]]}),
    ("r.json", "score --score c.json --refs r.json", {"images": [], "annotations": [{"image_id": 1, "caption": "a ring"}]}, {
        "annotations": [None, 7, "x", {}], "images": [None, 7, [None], [{}]], "annotations 0 caption": [None, 7, {}]}),
    ("r.json", "score --score c.json --refs r.json", {"images": [{"cocoid": 1, "sentences": [{"raw": "a ring"}]}]}, {
        "images 0 sentences": [DROP, None, 7, [], [7]], "images 0 sentences 0 raw": [DROP, None, 7], "images 0 cocoid": [[], {}]}),
    ("r.json", "score --score c.json --refs r.json", {"1": ["a ring"]}, {"1": [None, 7, [], [None], [[]], {"a": 1}]}),
    ("w.json", "given --captions w.json", {"a.png": ["a ring", "a wall"]}, {"": [[], None, 7, "x", {}], "a.png": [None, 7, [7], [None], [[]], {"b": 1}]}),
    ("w.jsonl", "given --captions w.jsonl", '{"image": "a.png", "captions": ["a ring", "a wall"]}\n', {
        "0": [None, 7, []], "0 image": [DROP, None, [], {}], "0 captions": [DROP, None, 7, [7], [None], {}]}),
    ("v.json", "given --images v.json", {"ring": ["a.png", "b.png"]}, {"": [[], None, 7, {}], "ring": [None, 7, [7], [None], ["nothing.png"], {}]}),
    ("s.json", "rerank s.json", ["a red ring"], {"": [{}, None, 7, "x", [7], [None], [["x"]], []]}),
    (ROWS, "rerank a.png b.png", "done", {
        "0 item": [DROP, None, 7, []], "0 candidate": [DROP, "x", [], -1, 10], "0 caption": [DROP, None, 7],
        "0 picture": [DROP, 7, []], "0 scores": [DROP, None, [], {"both": "x"}, {}], "0 scores both": ["high", [], True],
        "0 direction": [DROP, "x", 7], "0": [None, 7, []]}),
    (OLD, "rerank a.png b.png", "done", {"": [[], None, "x", {}], "seed": [DROP, [], 0], "captioner": [None, {"a": 1}]}),
    ("o/winners/metadata.jsonl", "rerank a.png b.png", "done", {"0": [None, 7, []], "0 file_name": [DROP, 7, None, []]}),
    ("o/revisions.jsonl", "rerank a.png b.png set/3.png", "done", {"0": [None, 7, []]}),
    (ROWS, "rerank a.png b.png --words", "worded", {"0 words": ["x", 7, [[1]], [["a", "b", "c"]]]}),
    ("o/captions-0.jsonl", "evaluate --data set", "scored", {
        "0 item": [DROP, [], None], "0 caption": [DROP, None, 7, []]}),
    ("o/images-0.jsonl", "evaluate --data set", "scored", {"0 picture": [DROP, 7, []], "0 item": [DROP, []]}),
    ("o/log.jsonl", "finetune --data set --steps 4", "trained", {"0 step": [DROP, None, "x", []]}),
    (CKPT, "finetune --data set --steps 4", "trained", {
        "step": [DROP, None, "x", -5, 0, 1.5, True, 10 ** 12], "data": [DROP, None, 7], "settings": [DROP, None, [], {}],
        "settings losses": [None, "tg", ["xx"], [7]], "settings weights": [[float("nan")] * 4, "x", [1]],
        "settings lr": ["x", [], [-1], None], "settings seed": [[], "x"], "settings batch": [0, "2", None],
        "settings captioner": [7, "-x", "a/b"]}),
    ("m/config.json", M, copy("miniature/blip"), {
        "": [[], None], "model_type": [DROP, 7, "gpt2", None], "text_config": [None, 7], "text_config vocab_size": ["x", 5, -1],
        "text_config num_attention_heads": [0], "text_config hidden_size": [-1, 0], "text_config bos_token_id": [10 ** 6, None],
        "text_config sep_token_id": [None], "vision_config image_size": ["x", -1, 0, 10 ** 9]}),
    ("m/preprocessor_config.json", M, copy("miniature/blip"), {
        "": [[], {}], "image_mean": ["x", [], None, [0.5]], "image_std": [[0, 0, 0]], "size": ["x", {"height": -1, "width": -1}, {"height": 10 ** 6, "width": 10 ** 6}],
        "resample": [99, "x"]}),
    ("m/tokenizer.json", M, copy("miniature/blip"), {"": [{}, []], "model": [None, {}], "model vocab": [[], {}]}),
    ("m/tokenizer_config.json", M, copy("miniature/blip"), {"": [[], None], "tokenizer_class": [7]}),
    ("g/model_index.json", "rerank a.png --generator g", copy("miniature/sd"), {
        "": [[], {}, None], "unet": [DROP, 7, ["os", "system"], ["diffusers", "AutoencoderKL"], ["diffusers", 7]], "_class_name": [7, "Nonsense", DROP]}),
    ("g/scheduler/scheduler_config.json", "rerank a.png --generator g", copy("miniature/sd"), {
        "num_train_timesteps": [-1, 0, "x", 10 ** 12], "beta_schedule": ["x"], "beta_end": [float("nan"), "x", -1]}),
    ("g/unet/config.json", "rerank a.png --generator g", copy("miniature/sd"), {
        "": [[]], "sample_size": ["x", -1, 10 ** 6], "block_out_channels": [[], [7], "x"], "in_channels": [3]}),
]
OTHERS = {"c.json": {"1": "a ring"}, "r.json": {"1": ["a ring"]}}
for name, argv, start, keys in SHAPES:
    top = name.split("/")[0]
    files = (OTHERS if top in OTHERS else {}) | {top: start}
    change = head if name == CKPT else edit
    for words, values in keys.items():
        path = [int(word) if word.isdecimal() else word for word in words.split()]
        for value in values:
            made = after(files, name, change(*path, value))
            shown = "missing" if value is DROP else json.dumps(value)[:40]
            case("shapes", f"{name} {words or 'all'} {shown}", argv, either({"m": "'m'|m/", "g": "'g'|g/", CKPT: O, OLD: O}.get(name if top == "o" else top, name)), made)

# ---------------------------------------------------------------- text in other encodings, and too much of it
READ = [("s.txt", "rerank s.txt", {"s.txt": "a red ring\n"}), ("s.json", "rerank s.json", {"s.json": '["a red ring"]'}),
        (COCO, "rerank --data set", {"set": karpathy}), (META, "rerank --data set --split all", {"set": imagefolder}),
        ("c.json", "score --score c.json --refs r.json", {"c.json": '{"0": "a ring"}', "r.json": '{"0": ["a ring"]}'}),
        ("r.json", "score --score c.json --refs r.json", {"c.json": '{"0": "a ring"}', "r.json": '{"0": ["a ring"]}'}),
        (ROWS, "rerank a.png b.png", {"o": "done"}), (OLD, "rerank a.png b.png", {"o": "done"}),
        ("v.txt", "score --score c.json --refs r.json --glove v.txt",
         {"c.json": '{"0": "a ring"}', "r.json": '{"0": ["a ring"]}', "v.txt": "ring 1.0 2.0\n"})]
for (name, argv, files), (kind, change) in itertools.product(READ, TEXTS.items()):
    def write(path, change=change):
        path.write_bytes(change(path.read_text(encoding="utf-8")))
    fine = kind == "with a BOM" or (kind in ("empty", "of NUL bytes") and name in (META, ROWS)) or ("brackets" in kind and name == "s.txt")
    expected = either if name == "v.txt" and kind != "latin-1" else met if name == "v.txt" else refused
    slow = {"options": {"seconds": 10}} if "10 MB" in kind else {}
    case("texts", f"{name} {kind}", argv, (met if fine else expected)(name), after(files, name, write), **slow)
for name, text in {"without a column": "file_name\n0.png\n", "with a wide row": "file_name,text\n0.png,a,b,c\n", "with a short row": "file_name,text\n0.png\n",
                   "with an open quote": 'file_name,text\n0.png,"a ring\n1.png,a wall\n', "of a picture that is not there": "file_name,text\n9.png,a ring\n", "of no rows": "file_name,text\n"}.items():
    case("texts", f"metadata.csv {name}", "rerank --data set --split all", either("metadata.csv"), {"set": pictures, "set/metadata.csv": text})
for kind, change in TEXTS.items():
    case("texts", f"a .txt beside a picture {kind}", "rerank --data set --split all", (met if kind in ("empty", "with a BOM") or "000" in kind else refused)("0.txt"), {"set": pictures, "set/0.txt": change("a red ring")}, options={"seconds": 10})
case("texts", "a lone surrogate in a caption", "rerank --data set --turn text", met(COCO), {"set": karpathy, COCO: edit("images", 0, "sentences", 0, "raw", "a \ud800 ring")})
case("texts", "a lone surrogate in a sentence", "rerank s.json", met("s.json"), {"s.json": '["a \\ud800 ring"]'})
case("texts", "a lone surrogate in a candidate", "rerank a.png b.png", met(ROWS), {"o": "done", ROWS: edit(0, "caption", "\udc80")})
case("texts", "an ASCII terminal", ["rerank", "ein Löwe \u2603"], taken(), options={"ascii": True})
case("texts", "an ASCII terminal, an error", ["rerank", "Löwe.png"], refused("png"), options={"ascii": True})
case("texts", "a sentence of a NUL byte", "rerank s.txt", met("s.txt"), {"s.txt": "a red\0 ring"})
case("texts", "sentences from /dev/zero", "rerank s.txt", refused("s.txt"), {"s.txt": link("/dev/zero")}, options={"seconds": 10})
case("texts", "blank sentences", "rerank s.txt", refused("s.txt"), {"s.txt": " \n\n"})
case("texts", "an empty sentence", ["rerank", " "], refused("sentence"))
case("texts", "a sentence of 100,000 letters", ["rerank", "ring " * 20_000], taken())
case("texts", "a fifo of sentences", "rerank s.txt", refused("s.txt"), {"s.txt": fifo}, options={"timeout": 10})
for name, text in {"of another width": "ring 1 2\nwall 1\n", "of words": "ring one two\nwall x y\n", "of nan": "ring nan nan\nwall nan nan\n", "without our words": "cat 1 2\n"}.items():
    case("texts", f"vectors {name}", READ[-1][1], (met if "width" in name else either)("v.txt"), READ[-1][2] | {"v.txt": text})

# ---------------------------------------------------------------- pictures
RAW = (65535).to_bytes(4, "big")
BAD = {"no bytes": b"", "text": "a red ring", "noise": noise(), "a cut PNG": (scene(2), cut(.6)), "a PNG of its header": (scene(2), cut(.04)),
       "a cut JPEG": (picture("JPEG", size=(300, 300)), cut(.3)), "a cut GIF": (picture("GIF"), cut(.5)), "a cut WebP": (picture("WEBP"), cut(.7)),
       "a cut TIFF": (picture("TIFF"), cut(.5)), "a PNG 0 pixels wide": (picture(), changed(lambda x: x[:16] + bytes(4) + x[20:])),
       "a PNG of 65535 x 65535": (picture(), changed(lambda x: x[:16] + RAW + RAW + x[24:])),
       "144 megapixels": picture(mode="1", size=(12_000, 12_000)), "400 megapixels": picture(mode="1", size=(20_000, 20_000)),
       "a link to nothing": link("nowhere.png"), "a link to itself": link("bad.png"), "/dev/zero": link("/dev/zero"), "a fifo": fifo,
       "PostScript": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "SVG": "<svg xmlns='http://www.w3.org/2000/svg'/>",
       "a DDS": picture("DDS"), "a SPIDER": picture("SPIDER", "F"), "a BLP": picture("BLP", "P"), "a PDF": picture("PDF"),
       "a pickle": PAYLOAD, "an address": "file:///etc/passwd"}
GOOD = {"of 1 pixel": picture(size=(1, 1)), "of 1 x 3,000": picture(size=(1, 3000)), "with alpha": picture(mode="RGBA"), "of gray and alpha": picture(mode="LA"),
        "of a palette": picture(mode="P"), "of 16 bit": picture(mode="I;16"), "of 1 bit": picture(mode="1"), "CMYK": picture("JPEG", "CMYK"), "a BMP": picture("BMP"), "a TGA": picture("TGA"),
        "of floats": picture("TIFF", "F"), "of nan": (picture("TIFF", "F"), changed(lambda x: x.replace(x[-4:], b"\0\0\xc0\x7f"))), "Lab": picture("TIFF", "LAB"),
        "a JPEG named PNG": picture("JPEG"), "a broken profile": picture(icc_profile=b"nonsense"), "a broken EXIF": picture("JPEG", exif=b"Exif\0\0nonsense"), "orientation 99": picture("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0c\0\0\0\0\0\0\0")}
for name, content in BAD.items():
    case("pictures", f"{name} among others", "rerank a.png bad.png b.png", skipped("bad.png", done=2) if "link" not in name else either("bad.png"), {"bad.png": content}, options={"timeout": 20})
    case("pictures", f"{name} alone", "rerank bad.png", refused("bad.png"), {"bad.png": content}, options={"timeout": 20})
for name, content in GOOD.items():
    case("pictures", f"{name} is taken", "rerank a.png good.png", taken(done=2) if name not in ("of nan", "of floats") else met("good.png"), {"good.png": content})
for kind, seed in itertools.product(("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "DDS", "SPIDER", "BLP", "ICO", "AVIF"), range(3)):
    case("pictures", f"{kind} flipped by {seed}", "rerank a.png odd.png", met("odd.png"), {"odd.png": flipped(kind, seed)})
case("pictures", "a folder named as one", "rerank p.png", refused("p.png"), {"p.png": folder})
case("pictures", "an empty folder", "rerank p", refused("in p"), {"p": folder})
case("pictures", "a bad one of a set, evaluate", "evaluate --data set", skipped("0.png"), {"set": karpathy, "set/0.png": b""})
case("pictures", "all bad of a set, evaluate", "evaluate --data set", refused("set|pictures", lines=3), {"set": karpathy, "set/0.png": b"", "set/1.png": b""})
case("pictures", "a bad one, finetune", "finetune --data set", skipped("3.png"), {"set": karpathy, "set/3.png": b""})
case("pictures", "all bad, finetune", "finetune --data set", refused("set", lines=5), {"set": karpathy} | {f"set/{i}.png": b"" for i in range(4)})
case("pictures", "a bad one, label-free", "score --labelfree --images set --captions c.json", skipped("0.png"), {"set": pictures, "set/0.png": noise(), "c.json": {"0.png": "a", "1.png": "a ring"}})

# ---------------------------------------------------------------- paths out of the set, out of the folder
OUT = {"..": "../secret.png", "absolute": "/tmp/parley-secret.png", "file://": "file:///tmp/parley-secret.png", "a link": "link.png", "https": "https://example.org/secret.png"}
KEYS = {COCO: (karpathy, ("images", 0, "filename")), NOCAPS: (nocaps, ("images", 0, "file_name")), BLIP: (blip, (0, "image"))}
def absolute(path):
    if not os.path.exists("/tmp/parley-secret.png"):
        secret(path.__class__("/tmp/parley-secret.png"))
for (name, (make, keys)), (kind, place) in itertools.product(KEYS.items(), OUT.items()):
    case("paths", f"{name} {kind}", "rerank --data set", either("secret.png|link.png"), {"secret.png": secret, "x": absolute, "set": make, "set/link.png": link("../secret.png"), name: edit(*keys, place)})
    case("paths", f"{name} {kind}, evaluate", "evaluate --data set", either("secret.png|link.png"), {"secret.png": secret, "x": absolute, "set": make, "set/link.png": link("../secret.png"), name: edit(*keys, place)})
case("paths", "Karpathy's filepath", "rerank --data set", either("secret.png"), {"secret.png": secret, "set": karpathy, COCO: (edit("images", 0, "filepath", ".."), edit("images", 0, "filename", "secret.png"))})
case("paths", "a link in a folder", "rerank set", either("link.png"), {"secret.png": secret, "set": pictures, "set/link.png": link("../secret.png")})
case("paths", "a linked folder in a folder", "rerank set", met(), {"away": folder, "away/secret.png": secret, "set": pictures, "set/more": link("../away")})
case("paths", "--anywhere", "rerank --data set --anywhere", taken(), {"other.png": scene(3), "set": karpathy, COCO: edit("images", 0, "filename", "../other.png")})
for kind, place in OUT.items():
    more = {"secret.png": secret, "x": absolute, "o": "done", "o/link.png": link("../secret.png")}
    case("paths", f"candidate's picture {kind}", "rerank a.png b.png", either("secret.png|link.png"), more | {ROWS: edit(0, "picture", place)})
    case("paths", f"candidate's picture {kind}, findings", "score --findings o", either(ROWS + "|secret.png|link.png"), more | {"o": "turned", ROWS: edit(0, "picture", place)})
    case("paths", f"drawn picture {kind}, evaluate", "evaluate --data set", either("secret.png|link.png"), {"secret.png": secret, "x": absolute, "o": "scored", "o/link.png": link("../secret.png"), "o/images-0.jsonl": edit(0, "picture", place)})
case("paths", "candidate's input, words", "rerank a.png b.png --words", met("secret.png"), {"secret.png": secret, "o": "done", ROWS: (edit(0, "input", "../secret.png"), edit(1, "input", "../secret.png"))})
case("paths", "candidate's input, a text file", "rerank a.png b.png", met("secret.txt"), {"secret.txt": TEXT, "o": "done", ROWS: (edit(0, "input", "../secret.txt"), edit(1, "input", "../secret.txt"))})
case("paths", "candidate's input, pairs", "rerank a.png b.png --pairs trl", met("secret.png"), {"secret.png": secret, "o": "done", ROWS: (edit(0, "input", "../secret.png"), edit(1, "input", "../secret.png"))})
case("paths", "winners of an earlier run", "rerank a.png b.png", met("winners", then=unchanged("keep.txt", "mine")), {"keep.txt": "mine", "o": "done", "o/winners/metadata.jsonl": '{"file_name": "../../keep.txt", "text": "x"}\n'})
for kind, place in OUT.items():
    case("paths", f"given captions, {kind}", "given --captions in/w.json", either("secret.png|link.png"), {"secret.png": secret, "x": absolute, "in/link.png": link("../secret.png"), "in/w.json": {place: ["a ring", "a wall"]}})
    case("paths", f"given pictures, {kind}", "given --images in/v.json", either("secret.png|link.png"), {"secret.png": secret, "x": absolute, "in/link.png": link("../secret.png"), "in/v.json": {"a ring": [place, place]}})
case("paths", "a part of a pipeline ..", "rerank a.png --generator g", refused("'g'|g/"), {"g": copy("miniature/sd"), "g/model_index.json": edit("../unet", ["diffusers", "UNet2DConditionModel"])})
case("paths", "shards out of the folder", M, refused("'m'|m/"), {"m": copy("miniature/blip"), "m/model.safetensors": gone, "m/model.safetensors.index.json": {"metadata": {}, "weight_map": {"x": "../../x.safetensors"}}})

# ---------------------------------------------------------------- control characters
ESC = "\x1b]0;owned\x07\x1b[2J\x9b2J\x7f\u202e<script>alert(1)</script>"
NAME = "\x1b[2J<img src=x onerror=alert(1)>.png"
case("control", "a caption of a set", "rerank --data set --turn text", taken(then=plain_page), {"set": karpathy, COCO: edit("images", 0, "sentences", 0, "raw", ESC)})
case("control", "a caption of a set, evaluate", "evaluate --data set", taken(then=plain_files), {"set": karpathy, COCO: edit("images", 0, "sentences", 0, "raw", ESC)})
case("control", "a sentence", ["rerank", "a red ring " + ESC], taken(then=plain_page))
case("control", "a sentence of a file", "rerank s.txt", taken(then=plain_page), {"s.txt": ESC + "\n"})
case("control", "the name of a picture", ["rerank", NAME], taken(then=plain_page), {NAME: scene(1)})
case("control", "the name of a bad picture", ["rerank", NAME, "a.png"], skipped(".png"), {NAME: b""})
case("control", "the name of a missing picture", ["rerank", ESC + ".png"], refused(".png"))
case("control", "the name of a folder", ["rerank", "a.png", "--out", "o" + ESC.replace("/", "")], taken())
case("control", "a name that is no UTF-8", ["rerank", os.fsdecode(b"\xff.png"), "a.png"], met(".png"), {os.fsdecode(b"\xff.png"): scene(1)})
case("control", "a name with a new line", ["rerank", "a\nb.png"], met("b.png", then=plain_page), {"a\nb.png": scene(1)})
case("control", "the splits of a set", "rerank --data set --split val2", refused(COCO), {"set": karpathy, COCO: edit("images", 0, "split", ESC)})
case("control", "a domain", "evaluate --data set --limit 4", met(NOCAPS), {"set": nocaps, NOCAPS: edit("images", 0, "domain", ESC)})
case("control", "a key of metadata.jsonl", "rerank --data set --split all", refused(META), {"set": imagefolder, META: edit(0, {ESC: 1})})
case("control", "a formula as a caption", "given --captions w.json", taken(then=no_formula), {"w.json": {"a.png": [sign + "HYPERLINK(1)" for sign in ("=", "+", "-", "@", "\t=", " =")]}})
case("control", "a formula as a name", ["rerank", "=1+1.png"], taken(then=no_formula), {"=1+1.png": scene(1)})
case("control", "a candidate's caption", "rerank a.png b.png", taken(then=plain_page), {"o": "done", ROWS: edit(0, "caption", ESC)})
case("control", "a candidate's score", "rerank a.png b.png", met(ROWS, then=plain_page), {"o": "done", ROWS: (edit(0, "scores", ESC, 1.0), edit(1, "scores", ESC, 1.0))})
case("control", "a candidate's word", "rerank a.png b.png --words", met(ROWS, then=plain_page), {"o": "worded", ROWS: edit(0, "words", [[ESC, 1.0, 1.0]])})
case("control", "settings of the folder", "rerank a.png b.png", refused(O), {"o": "done", OLD: edit("captioner", ESC)})
case("control", "a checkpoint's settings", "finetune --data set", refused(O), {"o": "trained", CKPT: head("settings", "captioner", ESC)})
case("control", "a checkpoint's data", "finetune --data set --steps 4", refused(O), {"o": "trained", CKPT: head("data", ESC)})
case("control", "a tensor's name", "rerank a.png --ckpt o/checkpoint.safetensors --out p", refused(O), {"o": "trained", CKPT: tensors(lambda found: {"captioner." + ESC: found.popitem()[1]})})
case("control", "a model's type", M, refused("'m'|m/"), {"m": copy("miniature/blip"), "m/config.json": edit("model_type", ESC)})
case("control", "a part of a pipeline", "rerank a.png --generator g", refused("'g'|g/"), {"g": copy("miniature/sd"), "g/model_index.json": edit("unet", ["diffusers", ESC])})
case("control", "an image of --score", "score --score c.json --refs r.json", refused("c.json"), {"c.json": {ESC: "a ring"}, "r.json": {"1": ["a ring"]}})
case("control", "a caption, label-free", "score --labelfree --images set --captions c.json", taken(then=plain_files), {"set": pictures, "c.json": {"0.png": ESC}})
case("control", "what a model raises", "cycle a.png --generator m.py:load", refused("m.py"), {"m.py": f"def load(*a):\n    raise ValueError({ESC!r})"})
case("control", "what a model says", MPY, taken(then=plain_page), {"m.py": speaks(f"return [[{ESC!r}] * n for _ in images], torch.zeros(b, n)")})
for flag in ("--captioner", "--generator", "--data", "--by", "--way", "--ckpt", "--judges", "--device", "--dtype", "--split", "--glove", "--likeness", "--scorer"):
    case("control", f"the value of {flag}", ["rerank", "--data", "set", flag, ESC], refused("rerank"))

# ---------------------------------------------------------------- stale work shown as new
NEXT = "rerank a.png b.png"
case("stale", "a picture changed since", NEXT, either("a.png"), first=NEXT, change={"a.png": scene(9)})
case("stale", "an input deleted since", NEXT, either("a.png"), first=NEXT, change={"a.png": gone})
case("stale", "a drawing deleted since", NEXT, met("pictures/", done=2), {"o": "done", "o/pictures": gone})
case("stale", "a drawing damaged since", NEXT, met("pictures/", done=2), {"o": "done", ROWS: edit(0, "picture", "pictures/bad.png"), "o/pictures/bad.png": b"nonsense"})
case("stale", "another split", "rerank --data set --split val", refused("test", "val"), first="rerank --data set")
case("stale", "another split, evaluate", "evaluate --data set --split val", refused("test", "val"), first="evaluate --data set")
case("stale", "another set of this name", "rerank --data y/set", refused("set"), {"x/set": karpathy, "y/set": (karpathy, folder), "y/set/0.png": scene(8)}, first="rerank --data x/set")
case("stale", "the set changed since", "rerank --data set", either("set"), first="rerank --data set", change={COCO: edit("images", 0, "filename", "3.png")})
case("stale", "the set changed since, evaluate", "evaluate --data set", either("set"), first="evaluate --data set", change={COCO: edit("images", 0, "filename", "3.png")})
for script in ("rerank a.png", "evaluate --data set"):
    case("stale", f"the checkpoint changed since, {script}", f"{script} --ckpt t", either("ckpt"), {"t": "trained"}, first=f"{script} --ckpt t", change={"t/checkpoint.safetensors": tensors(each(lambda x: x * 2))})
case("stale", "the captioner changed since", M, either("captioner"), {"m": copy("miniature/blip")}, first=M, change={"m/model.safetensors": tensors(each(lambda x: x * 2 if x.is_floating_point() else x))})
case("stale", "a mistyped split of NoCaps", "rerank --data set --split ner", refused("ner"), {"set": nocaps})
case("stale", "a mistyped split of NoCaps, evaluate", "evaluate --data set --split ner", refused("ner"), {"set": nocaps})
case("stale", "its own pictures, rerank .", "rerank . --limit 9", taken(then=exactly(6)), {"o": "done"})
case("stale", "its own pictures, --out of the inputs", "rerank p --out p", taken(), {"p": pictures}, first="rerank p --out p")
case("stale", "weights that are no checkpoint", "rerank a.png --ckpt m", refused("--ckpt"), {"m": copy("miniature/blip")})
case("stale", "an export of nothing", "finetune --export e", refused("o/checkpoint.safetensors"))
case("stale", "the pictures of a training changed", "finetune --data set --steps 4", either(O), {"o": "trained"} | {f"set/{i}.png": scene(i + 9) for i in range(4)})
for script, name in (("rerank a.png", "index.html"), ("rerank a.png", "sheet.png"), ("evaluate --data set", "results.json"), ("evaluate --data set", "table.txt"), ("finetune --data set", "log.jsonl"), ("finetune --data set", "log.png")):
    case("stale", f"a {name} of one's own", script, refused(name, then=unchanged("o/" + name, '{"mine": 1}\n')), {"o/" + name: '{"mine": 1}\n'})

# ---------------------------------------------------------------- checkpoints and models
WEIGHTS = {"cut": cut(.5), "of no bytes": b"", "of text": "hello", "of a long header": long_header, "a pickle": PAYLOAD, "pickled by torch": pickled,
           "of nan": tensors(all_nan), "of integers": tensors(each(lambda x: x.int())), "of another shape": tensors(each(lambda x: x.flatten()[:1].clone())),
           "a git-lfs pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"}
USES = {"rerank --ckpt": "rerank a.png --ckpt o --out p", "going on": "finetune --data set --steps 4", "--export": "finetune --export e", "evaluate --ckpt": "evaluate --data set --ckpt o --out p"}
for (use, argv), (kind, change) in itertools.product(USES.items(), WEIGHTS.items()):
    case("weights", f"{use} {kind}", argv, refused(O), {"o": "trained", CKPT: change})
case("weights", "going on without moments", USES["going on"], refused(O), {"o": "trained", CKPT: tensors(without("adam."))})
case("weights", "going on with moments of nan", USES["going on"], refused(O), {"o": "trained", CKPT: tensors(lambda found: found | all_nan({k: v for k, v in found.items() if "adam." in k}))})
for kind, about in {"no header": {}, "a header of text": {"header": "x"}, "a header of null": {"header": "null"}, "a deep header": {"header": "[" * 100_000}}.items():
    case("weights", f"going on with {kind}", USES["going on"], refused(O), {"o": "trained", CKPT: tensors(None, lambda old, about=about: about)})
for flag, place, file in (("--captioner", "blip", "model.safetensors"), ("--generator", "sd", "unet/diffusion_pytorch_model.safetensors"), ("--generator", "sd", "text_encoder/model.safetensors"), ("--judges", "", "clip/model.safetensors")):
    for kind, change in WEIGHTS.items():
        case("weights", f"{flag} {file} {kind}", M if flag == "--captioner" else f"rerank a.png {flag} m", (either if flag == "--judges" else refused)("'m'|m/"), {"m" + ("/clip" if not place else ""): copy("miniature/" + (place or "clip")), "m/" + file: change})
for flag, place, file in (("--captioner", "blip", "config.json"), ("--captioner", "blip", "tokenizer.json"), ("--captioner", "blip", "model.safetensors"), ("--captioner", "blip", "preprocessor_config.json"), ("--generator", "sd", "tokenizer"), ("--generator", "sd", "vae"), ("--generator", "sd", "scheduler"), ("--generator", "sd", "unet/config.json")):
    case("weights", f"{flag} without {file}", M if flag == "--captioner" else "rerank a.png --generator m", refused("'m'|m/"), {"m": copy("miniature/" + place), "m/" + file: gone})
case("weights", "a captioner pickled as .bin", M, refused("'m'|m/", lines=2), {"m": copy("miniature/blip"), "m/model.safetensors": gone, "m/pytorch_model.bin": pickled})
case("weights", "a deep config.json", M, refused("'m'|m/"), {"m": copy("miniature/blip"), "m/config.json": "[" * 100_000})

# ---------------------------------------------------------------- file.py:function
LOADS = {"raises": "def load(*a):\n    raise RuntimeError('no\\nweights')", "does not parse": "def load(:", "imports what is not here": "import nonsense", "has no such function": "x = 1",
         "has a thing that is no function": "load = 7", "takes no arguments": "def load():\n    return 1", "gives None": "def load(*a):\n    return None", "gives a number": "def load(*a):\n    return 7",
         "leaves": "import sys\nsys.exit(0)", "leaves when called": "import sys\ndef load(*a):\n    sys.exit(0)", "is binary": noise()}
DRAWS = {"gives None": "return None", "raises": "raise KeyError('x')", "leaves": "sys.exit(0)", "gives too few": "return torch.zeros(n - 1, 3, 8, 8)", "gives too many": "return torch.zeros(n + 1, 3, 8, 8)",
         "gives no channels": "return torch.zeros(n, 8, 8)", "gives one channel": "return torch.zeros(n, 1, 8, 8)", "gives a list": "return [0] * n", "gives nan": "return torch.full((n, 3, 8, 8), float('nan'))",
         "gives 0 to 255": "return torch.full((n, 3, 8, 8), 255.)", "gives bytes": "return torch.zeros(n, 3, 8, 8, dtype=torch.uint8)", "gives no pixels": "return torch.zeros(n, 3, 0, 0)"}
SPEAKS = {"gives None": "return None", "raises": "raise KeyError('x')", "leaves": "sys.exit(0)", "gives captions alone": "return [['a ring'] * n] * b", "gives too few captions": "return [['a ring'] * (n - 1)] * b, torch.zeros(b, n - 1)",
          "gives too few items": "return [['a ring'] * n] * (b - 1), torch.zeros(b - 1, n)", "gives numbers": "return [[7] * n] * b, torch.zeros(b, n)", "gives wrong likelihoods": "return [['a ring'] * n] * b, torch.zeros(b)",
          "gives no likelihoods": "return [['a ring'] * n] * b, None", "gives nan": "return [['a ring'] * n] * b, torch.full((b, n), float('nan'))"}
for kind, text in LOADS.items():
    case("functions", f"a file that {kind}", "cycle a.png b.png --generator m.py:load", refused("m.py:load" if "file" not in kind else "m.py"), {"m.py": text})
    case("functions", f"a file that {kind}, as captioner", MPY, refused("m.py"), {"m.py": text})
for kind, body in DRAWS.items():
    case("functions", f"draw {kind}", "cycle a.png b.png --generator m.py:load", refused("m.py:load", "draw") if kind != "gives nan" else either("no numbers"), {"m.py": draws(body)})
for kind, body in SPEAKS.items():
    case("functions", f"speak {kind}", MPY, refused("m.py:load", "speak", lines=3), {"m.py": speaks(body)})
case("functions", "draw gives too few, evaluate", "evaluate --data set --generator m.py:load", refused("m.py:load", "draw"), {"m.py": draws(DRAWS["gives too few"])})
case("functions", "speak gives too few, evaluate", "evaluate --data set --captioner m.py:load --generator miniature", refused("m.py:load", "speak", lines=3), {"m.py": speaks(SPEAKS["gives too few items"])})

# ---------------------------------------------------------------- the machine
USUAL = {"rerank": ("rerank a.png b.png", taken(done=2)), "evaluate": ("evaluate --data set", taken()), "finetune": ("finetune --data set", taken(then=same_steps(2)))}
for (script, (argv, expected)), (name, hook) in itertools.product(USUAL.items(), {"stdout closed": closed(1), "stderr closed": closed(2), "no git": no_programs}.items()):
    case("machine", f"{script}, {name}", argv, expected, hook=hook)
for (script, (argv, _)), kind in itertools.product(USUAL.items(), ("CUDA", "CPU")):
    case("machine", f"{script}, out of memory on {kind}", argv, refused("--micro|--chunk" if script == "finetune" else "--batch"), hook=exhausted(kind))
for script, (argv, _) in USUAL.items():
    case("machine", f"{script}, --out where nothing can be written", f"{argv} --out /proc/nothing", refused("/proc/nothing"))
    case("machine", f"{script}, an ASCII terminal", argv.replace("set", "d\xe4ta").replace("a.png", "\xe4.png"), taken(), {"\xe4.png": scene(0), "d\xe4ta": karpathy}, options={"ascii": True})
