"""The miniature world: scenes, pictures, captions and the facts read back from them."""
import hashlib

import pytest
import torch

from miniature import world


def test_a_scene_is_a_function_of_split_and_index():
    assert world.sample("test", 3) == world.sample("test", 3) != world.sample("test", 4)
    a, b = world.sample("near", 5), world.sample("near", 5)
    assert (world.draw(a) == world.draw(b)).all() and world.captions(a) == world.captions(b)


def test_domains_are_what_they_say():
    for split, low, high in (("val", 0, 0), ("test", 0, 0), ("near", 1, 1), ("out", 1, 2)):
        for i in range(200):
            scene = world.sample(split, i)
            held = sum((o["colour"], o["shape"]) in world.HELD_OUT for o in scene["objects"])
            assert low <= held <= high and (split != "out" or held == len(scene["objects"]))
            assert split != "near" or len(scene["objects"]) == 2
    assert len(world.HELD_OUT) == 12 and {c for c, _ in world.HELD_OUT} == set(world.COLOURS)
    objects = [o for i in range(20_000) for o in world.sample("train", i)["objects"]]
    share = sum((o["colour"], o["shape"]) in world.HELD_OUT for o in objects) / len(objects)
    assert abs(share - world.RARE) <= .25 * world.RARE


def test_every_caption_is_true_of_its_scene_and_some_are_false_of_another():
    wrong = 0
    for i in range(300):
        scene, other = world.sample("all", i), world.sample("all", i + 1000)
        for caption in world.captions(scene):
            right, stated = world.verify(caption, scene)
            assert right == stated > 0, caption
            wrong += world.verify(caption, other)[0] < stated
    assert wrong > 1400                         # of 1500: one that says yes to all would give 0


SCENE = {"objects": [{"shape": "circle", "colour": "red", "size": "small", "x": 8, "y": 16},
                     {"shape": "cross", "colour": "blue", "size": "large", "x": 24, "y": 16}],
         "ground": "sand"}


@pytest.mark.parametrize("caption, right, stated", [
    ("a small red ball to the left of a blue plus on a beach", 7, 7),
    ("a red ball right of a blue plus", 4, 5),
    ("a blue ball", 1, 2),
    ("a large cross and a hoop at night", 2, 4),
    ("nothing of the kind", 0, 0),
    ("a red ball, a blue cross and a green heart", 4, 6),
    ("A PLUS beneath a DISC", 2, 3)])
def test_verify_by_hand(caption, right, stated):
    assert world.verify(caption, SCENE) == (right, stated)


def test_labels_lie_under_the_objects():
    for i in range(100):
        scene = world.sample("all", i)
        grid = world.grid(scene)
        for o in scene["objects"]:
            y, x = int(o["y"] / 4), int(o["x"] / 4)
            near = grid[:3, max(0, y - 1):y + 2, max(0, x - 1):x + 2].reshape(3, -1).T.tolist()
            label = [1 + list(world.SHAPES).index(o["shape"]),
                     1 + list(world.COLOURS).index(o["colour"]),
                     1 + list(world.SIZES).index(o["size"])]
            assert label in near


def test_a_picture_is_its_drawing():
    scene = world.sample("near", 3)
    picture = world.picture(scene)
    assert picture.shape == (3, 32, 32) and picture.dtype == torch.float32
    assert ((picture * 255).round().byte().permute(1, 2, 0).numpy() == world.draw(scene)).all()


def test_what_the_world_draws_and_says_stays():
    """All that was measured hangs on it. Pictures are left out of the sum: pillow draws them."""
    digest = hashlib.sha256()
    for split in world.SPLITS:
        for i in range(50):
            scene = world.sample(split, i)
            digest.update(repr(world.colour_shapes(scene)).encode())
            digest.update("\n".join(world.captions(scene)).encode())
    assert digest.hexdigest()[:16] == "95db2b96ce6c1182"


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'trian'.*train"):
        world.sample("trian", 0)
