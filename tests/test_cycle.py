"""The two conversations and their chance, with the trained miniature."""
import pytest
import torch

import cycle

CAPTION = "a small red ball on the grass"


def closeness(a, b):
    return -(a - b).square().mean((1, 2, 3))


# ---------------------------------------------------------------- the conversations
def test_image_text_image(captioner, generator, images):
    talk = cycle.image_text_image(captioner, generator, images[:3], 4, {"pixel": closeness}, seed=1,
                                  draw={"steps": 4})
    assert [len(row) for row in talk.captions] == [4] * 3
    assert talk.images.shape == (3, 4, 3, 32, 32)
    for b in range(3):
        far = (talk.images[b] - images[b]).square().mean((1, 2, 3)).tolist()
        assert talk.order["pixel"][b].tolist() == sorted(range(4), key=far.__getitem__)
        # the caption beside a picture is what it was drawn from
        expected = generator.draw(talk.captions[b], items=[b] * 4, seed=1, steps=4)
        assert (talk.images[b] - expected).abs().max() < 1e-4
    again = captioner.likelihood(images[:1].repeat(4, 1, 1, 1), talk.captions[0])
    assert torch.allclose(talk.likelihood[0], again, atol=1e-3)


def test_text_image_text(captioner, generator):
    def common(captions, texts):
        pairs = [(a.split(), b.split()) for a, b in zip(captions, texts)]
        return torch.tensor([len(set(a) & set(b)) for a, b in pairs])

    texts = [CAPTION, "a large blue ring at night"]
    talk = cycle.text_image_text(captioner, generator, texts, 3, {"words": common},
                                 draw={"steps": 4})
    assert talk.images.shape == (2, 3, 3, 32, 32)
    assert not torch.equal(talk.images[0, 0], talk.images[0, 1])
    assert talk.captions[1][2] == captioner.speak(talk.images[1, 2:], 1, "beam")[0][0][0]
    assert talk.scores["words"][0].tolist() == common(talk.captions[0], [CAPTION] * 3).tolist()


class Speaker:
    """Says what it was given, and counts."""

    def __init__(self, captions):
        self.captions = captions

    def speak(self, images, n, **more):
        return self.captions, torch.zeros(len(images), n)


class Painter:
    """A picture whose brightness is the caption's length, and what it was asked for."""

    def draw(self, captions, items, seed):
        self.asked = list(zip(captions, items))
        return torch.stack([torch.full((3, 2, 2), len(c) / 10) for c in captions])


def test_equal_captions_of_an_item_are_drawn_once():
    """And stand beside the right picture, whatever the two items have in common."""
    captions = [["aa", "b", "aa"], ["aa", "cccc", "b"]]
    painter = Painter()
    talk = cycle.image_text_image(Speaker(captions), painter, torch.ones(2, 3, 2, 2), 3,
                                  {"pixel": closeness}, items=["x", "y"])
    assert painter.asked == [("aa", "x"), ("b", "x"), ("aa", "y"), ("cccc", "y"), ("b", "y")]
    assert talk.images[:, :, 0, 0, 0].mul(10).round().tolist() == [[2, 1, 2], [2, 4, 1]]
    assert talk.order["pixel"].tolist() == [[0, 2, 1], [1, 0, 2]]


def test_a_candidate_without_a_score_is_last():
    score = torch.tensor([[-.5, torch.nan, -.2], [torch.nan, .1, .1]])
    talk = cycle.Talk([], torch.empty(0), torch.empty(0), {"x": score})
    assert talk.order["x"].tolist() == [[2, 0, 1], [1, 2, 0]]


def test_what_exists_is_not_made_anew():
    """Captions and pictures that are given: neither said, nor drawn."""
    class Reader:
        def likelihood(self, images, captions):
            assert len(images) == len(captions) <= 2
            return torch.tensor([float(len(c)) for c in captions])

        def speak(self, images, n, way):
            return [[f"{image.shape[-1]}"] for image in images], torch.ones(len(images), 1)

    painter = Painter()
    captions = [["aa", "b", "aa"]]
    talk = cycle.image_text_image(Reader(), painter, torch.ones(1, 3, 2, 2), None,
                                  {"pixel": closeness}, captions=[captions[0][:2]])
    assert painter.asked == [("aa", 0), ("b", 0)] and talk.likelihood.tolist() == [[2, 1]]
    assert cycle.read(Reader(), [0] * 3, captions[0], 2).tolist() == [2, 1, 2]
    pictures = [torch.zeros(3, 4, 4), torch.full((3, 4, 7), torch.nan)]
    talk = cycle.text_image_text(Reader(), None, ["4"], None,
                                 {"same": lambda a, b: [float(x == y) for x, y in zip(a, b)]},
                                 pictures=[pictures])
    assert talk.captions == [["4", "7"]] and talk.images[0] is pictures
    assert talk.scores["same"].nan_to_num(-1).tolist() == [[1, -1]]
    assert talk.likelihood.nan_to_num(-1).tolist() == [[1, -1]]


def test_a_picture_that_is_no_numbers_has_no_score():
    class Loses(Painter):
        def draw(self, captions, items, seed):
            out = super().draw(captions, items, seed)
            out[1, 0, 0, 0] = torch.inf
            return out

    talk = cycle.image_text_image(Speaker([["aa", "b", "cc"]]), Loses(), torch.ones(1, 3, 2, 2), 3,
                                  {"pixel": closeness})
    assert talk.scores["pixel"].isnan().tolist() == [[False, True, False]]
    assert talk.order["pixel"].tolist() == [[0, 2, 1]]
    assert cycle.finite(talk.images[0]).tolist() == [True, False, True]


# ---------------------------------------------------------------- chance
def test_chance_is_its_keys():
    """A function of the whole key, the same in every process."""
    def first(*key):
        return torch.rand(1, generator=cycle.chance(*key)).item()

    assert first("draw", 0, "x") == first("draw", 0, "x")
    keys = [("draw", 0, "x"), ("draw", 1, "x"), ("draw", 0, "y"), ("speak", 0, "x"),
            ("draw", 0, ("x", 1)), ("draw", 0, ("x", 2)), ("draw", 0, 1), ("draw", 0, "1")]
    assert len({first(*key) for key in keys}) == len(keys)
    assert cycle.chance("draw", 5, "x").initial_seed() == 2481274349664900979


def test_noises_are_the_one_line(generator):
    """Timesteps against (i + u) / draws of the schedule in float64; one in each of its parts."""
    for draws, seed, item in ((6, 3, "x"), (1, 0, 0), (12, 0, ("a", 4))):
        t, noise = cycle.noises(generator, draws, seed, item)
        dice = cycle.chance("denoise", seed, item, 0)
        u = torch.rand(draws, generator=dice).tolist()
        assert t.tolist() == [int((i + u[i]) / draws * 1000) for i in range(draws)]
        assert t.dtype == torch.int64 and (t // (1000 / draws)).tolist() == list(range(draws))
        assert torch.equal(noise, torch.randn(draws, 8, 8, 8, generator=dice))
    assert len(cycle.noises(generator)[0]) == 12


def test_noises_are_those_of_earlier_runs(generator):
    """Written down from the function that this one was made of: numbers that people keep stay."""
    t, noise = cycle.noises(generator, 6, 3, "x")
    assert t.tolist() == [120, 320, 467, 590, 832, 838]
    assert noise.shape == (6, 8, 8, 8)
    start = [-.06543134897947311, -1.5370515584945679, -.6412760615348816, .4005044102668762]
    end = [-.5960699915885925, .2240159660577774, -.9181938171386719, -.6447318196296692]
    assert noise[0, 0, 0, :4].tolist() == pytest.approx(start, abs=1e-6)
    assert noise[5, 7, 7, 4:].tolist() == pytest.approx(end, abs=1e-6)
    assert noise.double().sum().item() == pytest.approx(49.20638479900663, abs=1e-3)
