"""The denoising score against the definition, one candidate at a time; true captions against false
ones."""
import numpy as np
import pytest
import torch

import cycle
import losses
from miniature import world

SAID = ["a red ring", "a blue box at night", "a red ring", "two green hearts",
        "a tiny pink cross on the sand"]
COLOURS = {word for word, (kind, _) in world.WORDS.items() if kind == "colour"}


def drawing(scene):
    """A scene's picture: (3, 32, 32)."""
    return torch.from_numpy(world.draw(scene).copy()).permute(2, 0, 1) / 255


def absent_colour(scene):
    """One that is nowhere in the picture."""
    there = [thing["colour"] for thing in scene["objects"]]
    return next(colour for colour in world.COLOURS if colour not in there)


def by_hand(generator, mean, caption, timesteps, noise):
    """The mean squared errors (draws,) of one latent (C, h, w) under one caption, by the functions
    that training calls."""
    draws = len(timesteps)
    x = mean.expand(draws, -1, -1, -1)
    noised = losses.add_noise(generator.scheduler, x, noise, timesteps)
    with torch.no_grad():
        out = generator.predict(noised, timesteps, generator.states([caption] * draws))
    goal = losses.target(generator.scheduler, x, noise, timesteps)
    return (out - goal).square().mean((1, 2, 3)).double()


def error_by_hand(each):
    """From second differences of neighbours in time: their variance is six times that of one."""
    apart = np.diff(each.double().numpy(), 2)
    return (np.square(apart).mean() / 6 / len(each)) ** .5


def score(generator, images, captions, draws, seed=0, item=0, **more):
    return losses.score(generator, images, captions,
                        *cycle.noises(generator, draws, seed, item), **more)


# ---------------------------------------------------------------- what it is
def test_score_is_the_denoising_loss(generator, images):
    """Each caption alone: the same mean squared errors at the same draws, and their mean."""
    t, noise = cycle.noises(generator, 6, 3, "x")
    assert (t.diff() > 0).all()                  # stratified over the schedule
    loss = losses.score(generator, images[:1], SAID, t, noise, batch=12)
    assert loss.shape == (6, 5) and loss.dtype == torch.float64 and loss.device.type == "cpu"
    value, error = losses.mean_and_error(loss)
    mean, _ = generator.encode(images[:1])
    for i, caption in enumerate(SAID):
        each = by_hand(generator, mean[0], caption, t, noise)
        assert loss[:, i].tolist() == pytest.approx(each.tolist(), rel=1e-5)
        assert value[i].item() == pytest.approx(each.mean().item(), rel=1e-5)
        assert error[i].item() == pytest.approx(error_by_hand(each), rel=1e-3)
    assert torch.equal(loss[:, 0], loss[:, 2])   # equal captions are scored once
    again = score(generator, images[:1], SAID[:2], 6, 3, "x")
    assert torch.allclose(again, loss[:, :2], rtol=1e-5)       # company does not matter


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_score_follows_the_schedulers_prediction(generator, images, monkeypatch, kind):
    monkeypatch.setitem(generator.scheduler._internal_dict, "prediction_type", kind)
    t, noise = cycle.noises(generator, 3)
    loss = losses.score(generator, images[0], SAID[:2], t, noise)
    mean, _ = generator.encode(images[:1])
    for i in range(2):
        each = by_hand(generator, mean[0], SAID[i], t, noise)
        assert loss[:, i].tolist() == pytest.approx(each.tolist(), rel=1e-5)


def test_one_image_may_stand_alone(generator, images):
    """(3, H, W) is (1, 3, H, W), and a list of one."""
    one = score(generator, images[0], SAID, 3)
    assert torch.equal(one, score(generator, images[:1], SAID, 3))
    assert torch.equal(one, score(generator, [images[0]], SAID, 3))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_change_nothing(generator, images, batch):
    one = score(generator, images[:1], SAID, 5, batch=batch)
    assert torch.allclose(one, score(generator, images[:1], SAID, 5, batch=20), rtol=1e-5)


def test_evaluations_are_counted_right(generator, images):
    """Rows that pass the UNet: 2 a step and caption of a drawing, 1 a noise and caption of a
    score."""
    rows = []
    hook = generator.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))

    def counted(f, *args, **more):
        rows.clear()
        f(*args, **more)
        return sum(rows)

    assert counted(generator.draw, SAID[:2], steps=5) == 2 * 5 * 2
    assert counted(score, generator, images[:1], SAID, 6) == 6 * 4
    assert counted(score, generator, images[:1], SAID, 6, empty=True) == 6 * (4 + 1)
    assert counted(score, generator, images[:3], SAID[:1], 2) == 2 * 3 * 2
    assert counted(score, generator, images[:3], SAID[:1], 2, empty=False) == 2 * 3
    assert counted(score, generator, images[:3], SAID[:3], 4) == 4 * 3 * 2
    hook.remove()


# ---------------------------------------------------------------- its error
def test_errors_are_the_spread_over_seeds(generator, images):
    """The standard errors of a score and of a difference beside what 30 other choices of draws do
    to them."""
    mean, error, apart, gap = [], [], [], []
    for seed in range(30):
        loss = score(generator, images[:1], SAID[:2], 8, seed)
        one, own = losses.mean_and_error(loss)
        difference, of_difference = losses.mean_and_error(loss[:, 0] - loss[:, 1])
        mean.append(one)
        error.append(own)
        apart.append(difference)
        gap.append(of_difference)
    for value, reported in ((mean, error), (apart, gap)):
        spread = torch.stack(value).std(0)
        told = torch.stack(reported).mean(0)
        assert ((.7 * spread < told) & (told < 1.6 * spread)).all()


def test_errors_of_few_draws():
    """Of two draws from their difference, whose variance is twice that of one; of one, none."""
    mean, error = losses.mean_and_error(torch.tensor([[1.0, 5.0], [3.0, 5.0]]).double())
    assert mean.tolist() == [2, 5] and error.tolist() == [1, 0]
    mean, error = losses.mean_and_error(torch.tensor([[1.0, 5.0]]).double())
    assert mean.tolist() == [1, 5] and error.isnan().all() and error.shape == (2,)
    line = torch.arange(9).double()[:, None]     # moves with the timestep alone
    assert losses.mean_and_error(line)[1].item() == 0


# ---------------------------------------------------------------- several images
def test_images_given_a_text(generator, images):
    """What the caption adds to the empty one: an image that is easy to denoise gains nothing by
    that."""
    t, noise = cycle.noises(generator, 4)
    loss = losses.score(generator, images[:3], ["a red ring"], t, noise)
    assert loss.shape == (4, 3)
    mean, _ = generator.encode(images[:3])
    for i in range(3):
        with_it = by_hand(generator, mean[i], "a red ring", t, noise)
        without = by_hand(generator, mean[i], "", t, noise)
        expected = (with_it - without).mean().item()
        assert loss[:, i].mean().item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for some, captions in ((images[:2], ["a", "b", "c"]), (images[:3], SAID[:2]), (images[:1], [])):
        with pytest.raises(ValueError, match="as many of both"):
            losses.score(generator, some, captions, t, noise)


def test_images_with_their_own_captions(generator, images):
    """Pairs in one batch are what each pair is alone; the empty caption is subtracted where it is
    asked for."""
    both = score(generator, images[:3], SAID[:3], 4, 2)
    mean, error = losses.mean_and_error(both)
    for i in range(3):
        alone = score(generator, images[i], SAID[i:i + 1], 4, 2, empty=True)
        one, own = losses.mean_and_error(alone)
        assert mean[i].item() == pytest.approx(one[0].item(), rel=1e-3, abs=1e-6)
        assert error[i].item() == pytest.approx(own[0].item(), rel=1e-3, abs=1e-6)
    plain = score(generator, images[:1], [*SAID[:2], ""], 4, 2)
    less = score(generator, images[:1], SAID[:2], 4, 2, empty=True)
    assert torch.allclose(less, plain[:, :2] - plain[:, 2:], atol=1e-6)
    bare = score(generator, images[:3], SAID[:3], 4, 2, empty=False)
    assert torch.allclose(bare[:, :1], plain[:, :1], atol=1e-6) and plain.shape == (4, 3)


# ---------------------------------------------------------------- words
def test_words_are_dropped_under_the_same_noise(generator, images):
    """Each contribution by two calls of their own: the caption, and the caption without the
    word."""
    t, noise = cycle.noises(generator, 5, item="x")
    found = losses.words(generator, images[0], "a red ring at night", t, noise)
    assert [word for word, *_ in found] == ["a", "red", "ring", "at", "night"]
    shorter = {0: "red ring at night", 1: "a ring at night", 4: "a red ring at"}
    for i, caption in shorter.items():
        with_it = losses.score(generator, images[:1], ["a red ring at night"], t, noise)
        without = losses.score(generator, images[:1], [caption], t, noise)
        change = (without - with_it)[:, 0]
        assert found[i][1] == pytest.approx(change.mean().item(), abs=1e-6)
        assert found[i][2] == pytest.approx(error_by_hand(change), abs=1e-6)
    assert losses.words(generator, images[0], "", t, noise) == []


def test_a_planted_wrong_word_contributes_least(generator):
    """One colour exchanged for one that is nowhere in the picture (the project's evidence counts
    colours and shapes on 300)."""
    found = []
    for i in range(16):
        scene = world.sample("test", 300 + i)
        said = world.full_caption(scene).split()
        at = next(j for j, word in enumerate(said) if word in COLOURS)
        said[at] = absent_colour(scene)
        rows = losses.words(generator, drawing(scene), " ".join(said),
                            *cycle.noises(generator, 12, item=i))
        gains = [gain for _, gain, _ in rows]
        found.append(gains.index(min(gains)) == at)
    assert np.mean(found) >= .8


# ---------------------------------------------------------------- what it is good for
def test_true_captions_denoise_better(generator):
    """Of a scene's full caption and the same with one colour exchanged, the true one has the
    smaller loss."""
    right = []
    for i in range(30):
        scene = world.sample("test", 100 + i)
        true = world.full_caption(scene)
        word = next(w for w in true.split() if w in COLOURS)
        false = true.replace(word, absent_colour(scene), 1)
        mean, _ = losses.mean_and_error(score(generator, drawing(scene), [true, false], 8, item=i))
        right.append(bool(mean[0] < mean[1]))
    assert np.mean(right) > .8
