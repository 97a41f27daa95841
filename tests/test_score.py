"""The denoising score against the definition, one candidate at a time; halving; true captions against false ones."""
import numpy as np
import pytest
import torch

import cycle
import losses
import world

SAID = ["a red ring", "a blue box at night", "a red ring", "two green hearts", "a tiny pink cross on the sand"]


def test_score_is_the_denoising_loss(generator, images):
    """Each caption alone, without the shared stem, by losses.py: the same mean squared errors at the same draws."""
    found = cycle.score(generator, images[:1], SAID, draws=6, seed=3, item="x", batch=12)
    mean, _ = generator.encode(images[:1])
    t, noise = cycle.pairs(generator, mean, 6, 0, 3, "x", (.3, 1.0))
    assert (t >= 300).all() and (t.diff() > 0).all()                           # stratified over the span
    for caption, value, error in zip(SAID, found.score, found.error):
        x = mean.expand(6, -1, -1, -1)
        noised = losses.add_noise(generator.scheduler, x, noise, t)
        with torch.no_grad():
            out = generator.predict(noised, t, generator.states([caption] * 6))
        each = (out - losses.target(generator.scheduler, x, noise, t)).square().mean((1, 2, 3))
        assert value.item() == pytest.approx(-each.mean().item(), rel=1e-5)
        assert error.item() == pytest.approx(each.std().item() / 6 ** .5, rel=1e-4)
    assert found.evaluations == 6 * 4 and found.score[0] == found.score[2]     # equal captions are scored once
    assert found.gap.min() == 0 and found.gap.argmin() == found.score.argmax()
    again = cycle.score(generator, images[:1], SAID[:2], draws=6, seed=3, item="x")
    assert torch.allclose(again.score, found.score[:2], rtol=1e-5)             # company does not matter
    assert "forward" not in vars(generator.unet.conv_in)                       # the shared stem is gone


def test_images_given_a_text(generator, images):
    """What the caption adds to the empty one: an image that is easy to denoise gains nothing by that."""
    found = cycle.score(generator, images[:3], ["a red ring"], draws=4)
    mean, _ = generator.encode(images[:3])
    t, noise = cycle.pairs(generator, mean, 4, 0, 0, 0, (.3, 1.0))
    for i in range(3):
        x, losses_of = mean[i].expand(4, -1, -1, -1), []
        for words in ("a red ring", ""):
            noised = losses.add_noise(generator.scheduler, x, noise, t)
            with torch.no_grad():
                out = generator.predict(noised, t, generator.states([words] * 4))
            losses_of.append((out - losses.target(generator.scheduler, x, noise, t)).square().mean().item())
        assert found.score[i].item() == pytest.approx(losses_of[1] - losses_of[0], rel=1e-3, abs=1e-6)
    assert found.evaluations == 3 * 4 * 2
    with pytest.raises(ValueError, match="one of them must be one"):
        cycle.score(generator, images[:2], ["a", "b"])


@pytest.mark.parametrize("budget", [40, 100])
def test_halving_keeps_its_budget_and_a_winner(generator, images, budget):
    said = [f"a {c} {s}" for c in ("red", "blue", "green") for s in ("ring", "box", "heart")]
    found = cycle.score(generator, images[:1], said, budget=budget)
    assert found.evaluations <= budget and found.score.isfinite().all()
    assert found.score.argmax() == found.gap.argmin()


def test_true_captions_denoise_better(generator):
    """Of a scene's full caption and the same with one colour exchanged, the true one has the better score."""
    right = []
    for i in range(30):
        scene = world.sample("test", 100 + i)
        image = torch.from_numpy(world.draw(scene).copy()).permute(2, 0, 1)[None] / 255
        true = world.full_caption(scene)
        words = {w: c for c, (_, names) in world.COLOURS.items() for w in names}
        word = next(w for w in true.split() if w in words)
        other = next(c for c in world.COLOURS if c not in [o["colour"] for o in scene["objects"]])
        found = cycle.score(generator, image, [true, true.replace(word, other, 1)], draws=8, item=i)
        right.append(bool(found.score[0] > found.score[1]))
    assert np.mean(right) > .8


def test_few_steps_draw_nearly_the_same(generator):
    """DPM-Solver++ in 10 steps from the same noise: near the 50 steps of the checkpoint's own solver."""
    own = generator.draw(SAID[:2], items=[0, 1], steps=50)
    few = cycle.few_steps(cycle.Generator.load("miniature", "cpu")).draw(SAID[:2], items=[0, 1], steps=10)
    other = generator.draw(SAID[:2], items=[2, 3], steps=50)
    assert (few - own).square().mean() < .5 * (other - own).square().mean()
