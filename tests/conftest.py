"""Shared by all tests: the repository on the path, one thread (results must not hang on their
number), no network."""
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"                  # the planning folder; absent in a clone
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"              # of what the tests start, too

from miniature import toys  # noqa: E402

toys.tune_process("miniature")

# of properties (tests/hard/test_properties.py): the same few examples each time; or many, by
# pytest --hypothesis-profile=hard
KEPT = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=10, derandomize=True, **KEPT)
settings.register_profile("hard", max_examples=400, **KEPT)
settings.load_profile("few")


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("../shared (vocabularies, captions, photographs) is not beside this clone")
    return SHARED


@pytest.fixture(scope="session")
def scenes():
    from miniature import world
    return [world.sample("test", i) for i in range(6)]


@pytest.fixture(scope="session")
def images(scenes):
    """Six pictures of the miniature world: (6, 3, 32, 32) in [0, 1]."""
    import torch

    from miniature import world
    return torch.stack([world.picture(s) for s in scenes])


@pytest.fixture(scope="session")
def captioner():
    from captioners import Captioner
    return Captioner.load("miniature", "cpu")


@pytest.fixture(scope="session")
def generator():
    from generators import Generator
    return Generator.load("miniature", "cpu")


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    """Small random repositories in the hub's layouts, as local folders: layouts / "OWNER/NAME"."""
    from layouts import build
    return build(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="session")
def blip2(tmp_path_factory):
    """A small random BLIP-2 in the layout of Salesforce/blip2-opt-2.7b: 6 query tokens, 28 px."""
    from layouts import blip2
    folder = tmp_path_factory.mktemp("blip2")
    blip2(folder)
    return folder
