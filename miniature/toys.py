"""Where a script runs the miniature: what its process wants, and what the toys do not know.

    toys.tune_process(captioner, generator)
    note, warning = toys.told(captioner, generator, found)
"""
import ctypes
import functools
import os
import re
import sys
from collections import Counter
from pathlib import Path

import torch

import data
from miniature import world

VOCABULARY = {*"a an and".split(), *" ".join([*world.WORDS, *world.PHRASES]).split()}


# ---------------------------------------------------------------- threads and memory
def tune_process(*names):
    """What the miniature wants of its process; where another model is named, nothing is done.

    One thread: its tensors are too small to share, and beside other work threads that wait for each
    other take ten times as long (OMP_NUM_THREADS rules). And freed memory kept: see keep_memory.
    """
    if set(names) == {"miniature"}:
        keep_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)


@functools.cache
def keep_memory():
    """Tells glibc to keep freed memory, for this process: else it goes back to the system after
    each layer and comes anew page by page, a third of the miniature's time. Nothing happens
    elsewhere, nor where the environment says otherwise (MALLOC_TRIM_THRESHOLD_=131072 is glibc's
    own way)."""
    told = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}
    if sys.platform != "linux" or told & os.environ.keys():
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-1, 2 ** 31 - 1)            # M_TRIM_THRESHOLD: never
        libc.mallopt(-3, 2 ** 25)                # M_MMAP_THRESHOLD: the largest there is


# ---------------------------------------------------------------- what it knows
def strange(found):
    """What of inputs.Inputs the miniature does not know, as words: pictures that are not of its
    set, and captions with words that none of its own have. "" where it knows all."""
    home = data.SETS["miniature"]
    files = [item.path for item in found.items if item.path]
    texts = [item.captions[0] for item in found.items if not item.path]
    for candidates in found.given.values():
        texts += [x for x in candidates if isinstance(x, str)]
        files += [x for x in candidates if isinstance(x, Path)]
    pictures = [file for file in files if home not in Path(file).resolve().parents]
    words = Counter(word for text in texts for word in re.findall(r"\w+", text.lower()))
    words = [word for word in words if word not in VOCABULARY]
    said = []
    if pictures:
        said.append(f"{len(pictures)} of {len(files)} pictures, not of their set ({pictures[0]})")
    if words:
        said.append(f"{len(words)} words ({', '.join(words[:5])})")
    return " and ".join(said)


def told(captioner, generator, found):
    """(what to say of the miniature beside any result, what to warn of): "" where it isn't used,
    and where it knows what it was given."""
    small = [kind for kind, name in (("captioner", captioner), ("generator", generator))
             if name == "miniature"]
    if not small:
        return "", ""
    who = " and ".join(small)
    unknown = strange(found)
    warning = (f"TOY MODELS: the {who} of the miniature know small drawn shapes in "
               f"{len(VOCABULARY)} words, and do not know {unknown}: what comes of it means "
               "nothing. Real models: the same command with --captioner vitb --generator sd14, and "
               "another --out")
    note = f"Toy models here: the {who}, of a small drawn world (miniature/README.md)."
    return note, warning if unknown else ""
