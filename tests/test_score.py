"""The denoising score against the definition, one candidate at a time; halving; true captions against false ones."""
import numpy as np
import pytest
import torch

import cycle
import losses
from miniature import world

SAID = ["a red ring", "a blue box at night", "a red ring", "two green hearts", "a tiny pink cross on the sand"]


def test_score_is_the_denoising_loss(generator, images):
    """Each caption alone, without the shared stem, by losses.py: the same mean squared errors at the same draws."""
    found = cycle.score(generator, images[:1], SAID, draws=6, seed=3, item="x", batch=12, span=(.3, 1.0))
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
        apart = np.diff(each.double().numpy(), 2)                              # of neighbours in time
        assert error.item() == pytest.approx((np.square(apart).sum() / 6 / 4 / 6) ** .5, rel=1e-3)
    assert found.evaluations == 6 * 4 and found.score[0] == found.score[2]     # equal captions are scored once
    assert found.gap.min() == 0 and found.gap.argmin() == found.score.argmax()
    again = cycle.score(generator, images[:1], SAID[:2], draws=6, seed=3, item="x", span=(.3, 1.0))
    assert torch.allclose(again.score, found.score[:2], rtol=1e-5)             # company does not matter
    assert "forward" not in vars(generator.unet.conv_in)                       # the shared stem is gone


def test_errors_are_the_spread_over_seeds(generator, images):
    """The standard errors of a score and of a difference beside what 30 other choices of draws do to them."""
    found = [cycle.score(generator, images[:1], SAID[:2], draws=8, seed=s) for s in range(30)]
    score, apart = (torch.stack(x) for x in zip(*((f.score, f.score[0] - f.score[1]) for f in found)))
    for reported, spread in ((torch.stack([f.error for f in found]), score.std(0)),
                             (torch.stack([f.gap.max() for f in found]), apart.std(0))):
        assert ((.7 * spread < reported.mean(0)) & (reported.mean(0) < 1.6 * spread)).all()


def test_evaluations_are_counted_right(generator, images):
    """Rows that pass the UNet: 2 a step and caption of a drawing, 1 a noise and caption of a score."""
    rows = []
    hook = generator.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))
    for f, want in ((lambda: generator.draw(SAID[:2], steps=5), 2 * 5 * 2),
                    (lambda: cycle.score(generator, images[:1], SAID, draws=6), 6 * 4),
                    (lambda: cycle.score(generator, images[:3], SAID[:1], draws=2), 2 * 3 * 2),
                    (lambda: cycle.score(generator, images[:1], SAID, budget=30), 30)):
        rows.clear()
        found = f()
        assert sum(rows) == want == getattr(found, "evaluations", want)
    hook.remove()


def test_images_given_a_text(generator, images):
    """What the caption adds to the empty one: an image that is easy to denoise gains nothing by that."""
    found = cycle.score(generator, images[:3], ["a red ring"], draws=4, span=(.3, 1.0))
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
    assert cycle.score(generator, images[:3], ["a red ring"], budget=12).evaluations == 12
    with pytest.raises(ValueError, match="as many of both"):
        cycle.score(generator, images[:2], ["a", "b", "c"])


def test_images_with_their_own_captions(generator, images):
    """Pairs in one batch are what each pair is alone; the empty caption is subtracted where it is asked for."""
    both = cycle.score(generator, images[:3], SAID[:3], draws=4, seed=2)
    for i in range(3):
        alone = cycle.score(generator, images[i:i + 1], SAID[i:i + 1], draws=4, seed=2, empty=True)
        assert both.score[i].item() == pytest.approx(alone.score[0].item(), rel=1e-3, abs=1e-6)
        assert both.error[i].item() == pytest.approx(alone.error[0].item(), rel=1e-3, abs=1e-6)
    plain = cycle.score(generator, images[:1], [*SAID[:2], ""], draws=4, seed=2)
    less = cycle.score(generator, images[:1], SAID[:2], draws=4, seed=2, empty=True)
    assert torch.allclose(less.score, plain.score[:2] - plain.score[2], atol=1e-6) and less.evaluations == 4 * 3
    assert torch.equal(plain.timesteps, both.timesteps) and plain.loss.shape == (4, 3)


def test_words_are_dropped_under_the_same_noise(generator, images):
    """Each contribution by two calls of their own: the caption, and the caption without the word."""
    found = cycle.words(generator, images[0], "a red ring at night", draws=5, item="x")
    assert [w for w, *_ in found] == ["a", "red", "ring", "at", "night"]
    for i, shorter in ((0, "red ring at night"), (1, "a ring at night"), (4, "a red ring at")):
        with_, without = (cycle.score(generator, images[:1], [c], 5, item="x").loss[:, 0]
                          for c in ("a red ring at night", shorter))
        assert found[i][1] == pytest.approx((without - with_).mean().item(), abs=1e-6)
        apart = np.diff((without - with_).numpy(), 2)
        assert found[i][2] == pytest.approx((np.square(apart).sum() / 6 / 3 / 5) ** .5, abs=1e-6)


def test_a_planted_wrong_word_contributes_least(generator):
    """One colour exchanged for one that is nowhere in the picture (results.py counts colours and shapes on 300)."""
    found = []
    for i in range(16):
        scene = world.sample("test", 300 + i)
        image = world.picture(scene)
        colours = {w for w, (kind, _) in world.WORDS.items() if kind == "colour"}
        said = world.full_caption(scene).split()
        at = next(j for j, w in enumerate(said) if w in colours)
        said[at] = next(c for c in world.COLOURS if c not in [o["colour"] for o in scene["objects"]])
        rows = cycle.words(generator, image, " ".join(said), draws=12, item=i)
        found.append(min(range(len(rows)), key=lambda j: rows[j][1]) == at)
    assert np.mean(found) >= .8


@pytest.mark.parametrize("budget", [40, 100])
def test_halving_keeps_its_budget_and_a_winner(generator, images, budget):
    said = [f"a {c} {s}" for c in ("red", "blue", "green") for s in ("ring", "box", "heart")]
    found = cycle.score(generator, images[:1], said, budget=budget)
    assert found.evaluations <= budget and found.score.isfinite().all()
    assert found.score.argmax() == found.gap.argmin() and (found.error > 0).all()
    few = cycle.score(generator, images[:1], said, budget=1)                                   # a draw a round
    assert few.evaluations == 9 + 5 + 3 + 2 and few.error.isnan().all()                        # tells no error
    even = cycle.score(generator, images[:1], said, budget=3 * (9 + 5 + 3 + 2))                # equal numbers of draws
    assert sorted((~even.loss.isnan()).sum(0).tolist()) == [3] * 4 + [6] * 2 + [9] + [12] * 2


def test_true_captions_denoise_better(generator):
    """Of a scene's full caption and the same with one colour exchanged, the true one has the better score."""
    right = []
    for i in range(30):
        scene = world.sample("test", 100 + i)
        image = world.picture(scene)[None]
        true = world.full_caption(scene)
        words = {w for w, (kind, _) in world.WORDS.items() if kind == "colour"}
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


def test_distilled_checkpoints_keep_their_solver():
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
    generator = cycle.Generator.load("miniature", "cpu")
    own = generator.pipe.scheduler
    for scheduler, keeps in ((LCMScheduler(), True), (EulerDiscreteScheduler(timestep_spacing="trailing"), True),
                             (EulerDiscreteScheduler(), False), (own, False)):
        generator.pipe.scheduler = scheduler
        cycle.few_steps(generator)
        assert (generator.pipe.scheduler is scheduler) == keeps
        assert keeps or isinstance(generator.pipe.scheduler, DPMSolverMultistepScheduler)
