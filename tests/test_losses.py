"""The losses against the libraries' own, the formulas in float64, one graph, and finite
differences."""
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from diffusers import DDIMScheduler

import bridge
import losses
from captioners import Captioner
from generators import Generator
from miniature import world

ALL = dict.fromkeys(losses.NAMES, 1.0)


@pytest.fixture(scope="module")
def pair():
    """Both sides of the miniature in float64, with the query projections of cross-attention
    open."""
    captioner = Captioner.load(ROOT / "miniature/blip", "cpu", torch.float64)
    generator = Generator.load(ROOT / "miniature/sd", "cpu", torch.float64)
    return captioner, generator


@pytest.fixture()
def opened(pair):
    captioner, generator = pair
    found = {"captioner": some(captioner.model, ".crossattention.self.query."),
             "generator": some(generator.unet, ".attn2.to_q.")}
    for p in every(found):
        p.requires_grad_().grad = None
    yield found
    for p in every(found):
        p.requires_grad_(False).grad = None


def some(model, word):
    """Its parameters that have this in their names."""
    return [p for name, p in model.named_parameters() if word in name]


def every(opened):
    return [*opened["captioner"], *opened["generator"]]


@pytest.fixture(scope="module")
def way(pair):
    captioner, generator = pair
    embeddings = generator.text_encoder.get_input_embeddings().weight
    return bridge.Bridge(captioner.tokenizer, generator.tokenizer, embeddings,
                         size=len(captioner.head.weight), begin=captioner.prompt[0],
                         end=captioner.end)


@pytest.fixture(scope="module")
def cross(pair, way):
    def over(reading, layout):
        embeddings, ce, _ = way(reading.hidden, reading.weight, reading.bias, layout)
        return bridge.soft_states(pair[1].text_encoder, embeddings, layout.target), ce
    return over


@pytest.fixture(scope="module")
def batch(pair, way, images):
    captioner, generator = pair
    said = [world.captions(world.sample("test", i))[0] for i in range(4)]
    torch.manual_seed(0)
    mean, _ = generator.encode(images[:4])
    return losses.Batch(said, images[:4].double(), way.layout(said, captioner.lead), mean,
                        torch.randn_like(mean), torch.tensor([20, 300, 600, 990]))


def part(batch, rows):
    """Some samples of a batch, laid out on their own."""
    lay = replace(batch.layout, **{k: v[rows] for k, v in vars(batch.layout).items()})
    # positions as the captioner would pad them
    length = int((lay.source >= 0).any(0).nonzero().max()) + 1
    lay = replace(lay, source=lay.source[:, :length], align=lay.align[:, :, :length])
    weight = batch.tr_weight
    if weight is not None:
        weight = weight[rows]
    return losses.Batch([batch.captions[i] for i in rows], batch.images[rows], lay,
                        batch.latents[rows], batch.noise[rows], batch.timesteps[rows], weight)


def gradient(opened):
    """Of all that is open; afterwards there is none."""
    grads = []
    for p in every(opened):
        grads.append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
        p.grad = None
    return grads


def far(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b))


# ---------------------------------------------------------------- against the libraries
def test_caption_loss_is_blips_own(captioner, images):
    said = "a red ring", "a tiny blue heart above a green cross", "a box"
    for image, caption in zip(images[:3], said):
        words = captioner.tokenizer(caption, add_special_tokens=False).input_ids
        ids = torch.tensor([[*captioner.prompt, *words, captioner.end]])
        labels = ids.clone()
        labels[:, :len(captioner.prompt)] = -100
        own = captioner.model.text_decoder(
            input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids),
            encoder_hidden_states=captioner.see(image[None])).loss
        ours = losses.caption_loss(captioner.read(image[None], [caption]))
        assert ours.item() == pytest.approx(own.item(), rel=1e-5) and ours.item() > .1


def test_caption_loss_is_blip2s_own(blip2, images):
    captioner = Captioner.load(blip2, "cpu")
    words = captioner.tokenizer(" a red ring", add_special_tokens=False).input_ids
    q = captioner.model.config.num_query_tokens
    places = [captioner.model.config.image_token_index] * q
    ids = torch.tensor([[*places, *captioner.prompt, *words, captioner.end]])
    labels = ids.clone()
    labels[:, :q + len(captioner.prompt)] = -100
    own = captioner.model(pixel_values=captioner.pixels(images[:1]), input_ids=ids, labels=labels,
                          attention_mask=torch.ones_like(ids)).loss
    ours = losses.caption_loss(captioner.read(images[:1], ["a red ring"]))
    assert ours.item() == pytest.approx(own.item(), rel=1e-5)


def test_fused_and_plain_caption_losses_agree(pair, batch, cross):
    reading = pair[0].read(batch.images, batch.captions)
    _, ce = cross(reading, batch.layout)
    fused = losses.per_caption(ce, reading.targets)
    assert far([fused], [losses.caption_loss(reading)]) < 1e-10


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusion_is_the_schedulers(kind):
    """Noised and target equal diffusers' own; a perfect prediction gives the image back, at every
    timestep."""
    scheduler = DDIMScheduler(prediction_type=kind, beta_schedule="scaled_linear",
                              beta_start=.00085, beta_end=.012)
    torch.manual_seed(0)
    t = torch.arange(1000)
    x, noise = torch.randn(2, 1000, 2, 3, 3, dtype=torch.float64)
    noised = losses.add_noise(scheduler, x, noise, t)
    goal = losses.target(scheduler, x, noise, t)
    assert far([noised], [scheduler.add_noise(x, noise, t)]) < 1e-12
    own = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x, noise, t), "sample": x}[kind]
    assert far([goal], [own]) < 1e-12
    assert far([losses.one_step(scheduler, noised, goal, t)], [x]) < 1e-10
    if kind == "epsilon":                        # Section 4.2, in plain numbers
        a = scheduler.alphas_cumprod[700].item()
        by_hand = (noised[700] - (1 - a) ** .5 * .3) / a ** .5
        out = torch.full_like(x[[700]], .3)
        assert far(losses.one_step(scheduler, noised[[700]], out, t[[700]]), [by_hand]) < 1e-10


def test_another_prediction_is_refused():
    scheduler = DDIMScheduler()
    scheduler.register_to_config(prediction_type="flow")
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="'flow': epsilon, v_prediction and sample"):
        losses.target(scheduler, x, x, torch.tensor([3]))


# ---------------------------------------------------------------- who is reached
BOTH = {"captioner", "generator"}


@pytest.mark.parametrize("name, reached", [("tg", {"captioner"}), ("ir", BOTH),
                                           ("ig", {"generator"}), ("tr", BOTH)])
def test_who_is_reached(pair, opened, batch, cross, name, reached):
    total, _ = losses.joint(*pair, cross, batch, {name: 1.0})
    total.backward()
    for side, parameters in opened.items():
        if side in reached:
            assert all(p.grad is not None and p.grad.norm() > 1e-9 for p in parameters)
        else:
            assert all(p.grad is None for p in parameters)
    parts = [pair[0].model, *pair[1].pipe.components.values()]
    parts = [x for x in parts if isinstance(x, torch.nn.Module)]
    known = [p for x in parts for p in x.parameters()]
    open_now = {id(p) for p in every(opened)}
    shut = [p for p in known if id(p) not in open_now]
    assert all(p.grad is None for p in shut) and len(shut) > 100


def test_a_subset_pays_only_for_what_it_uses(pair, opened, batch, cross, monkeypatch):
    captioner, generator = pair
    bare = losses.Batch(batch.captions, batch.images)          # no generator at all
    tg = losses.joint(captioner, None, None, bare, {"tg": 1})[1]["tg"]
    # no captioner, no pictures
    bare = losses.Batch(batch.captions, None, None, batch.latents, batch.noise, batch.timesteps)
    ig = losses.joint(None, generator, None, bare, {"ig": 1})[1]["ig"]
    sizes, passes = [], []
    predict, read = generator.predict, captioner.read
    monkeypatch.setattr(generator, "predict", lambda x, *a: sizes.append(len(x)) or predict(x, *a))
    monkeypatch.setattr(captioner, "read", lambda *a: passes.append(len(a[1])) or read(*a))
    losses.joint(captioner, generator, cross, batch, {"ir": 1})
    each = losses.joint(captioner, generator, cross, batch, ALL, chunk=3)[1]
    # one UNet call; tg and ir share a reading
    assert sizes == [4, 8] and passes == [4, 4, 3, 1]
    assert far([each["tg"], each["ig"]], [tg, ig]) < 1e-10


def test_a_certain_captioner_makes_ir_ig(pair, opened, batch):
    """If the bridge gave exactly the human caption, Eq. 2 would be Eq. 3: same noised image,
    timestep and noise."""
    captioner, generator = pair

    def certain(reading, layout):
        return generator.states(batch.captions), reading.hidden.new_zeros(reading.targets.shape)
    each = losses.joint(captioner, generator, certain, batch, ALL)[1]
    assert torch.equal(each["ir"], each["ig"]) and (each["ig"] > 0).all()


# ---------------------------------------------------------------- the split backward
def test_split_is_one_graph(pair, opened, batch, cross):
    weights = {"tg": .5, "ir": 2.0, "ig": 1.0, "tr": .7}
    total, each = losses.joint(*pair, cross, batch, weights, split=False)
    by_hand = sum(weight * each[name].sum().item() for name, weight in weights.items())
    assert total.item() == pytest.approx(by_hand, rel=1e-12)
    total.backward()
    one = gradient(opened)
    for chunk in (1, 3):
        losses.joint(*pair, cross, batch, weights, chunk=chunk)[0].backward()
        assert far(gradient(opened), one) < 1e-10
    assert min(g.abs().max().item() for g in one) > 1e-6


def test_micro_batches_change_nothing(pair, opened, batch, cross):
    losses.joint(*pair, cross, batch, ALL)[0].backward()
    one = gradient(opened)
    values = []
    for i in range(4):
        total, each = losses.joint(*pair, cross, part(batch, [i]), ALL)
        total.backward()
        values.append(torch.stack(list(each.values())))
    assert far(gradient(opened), one) < 1e-10
    whole = losses.joint(*pair, cross, batch, ALL)[1]
    gradient(opened)
    assert far(torch.cat(values, 1), list(whole.values())) < 1e-10


def test_thinned_tr_is_that_of_the_samples_with_a_weight(pair, opened, batch, cross):
    thinned = part(batch, [0, 1, 2, 3])
    thinned.tr_weight = torch.tensor([0.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    total, each = losses.joint(*pair, cross, thinned, {"tr": 1.0})
    total.backward()
    thin = gradient(opened)
    total, alone = losses.joint(*pair, cross, part(batch, [1]), {"tr": 2.0})
    total.backward()
    assert far(gradient(opened), thin) < 1e-10
    assert each["tr"].isnan().tolist() == [True, False, True, True]
    assert each["tr"][1].item() == pytest.approx(alone["tr"].item(), rel=1e-10)
    thinned.tr_weight = torch.zeros(4, dtype=torch.float64)
    losses.joint(*pair, cross, thinned, {"tr": 1.0})[0].backward()
    assert not any(g.any() for g in gradient(opened))


def test_numerical_gradient_of_the_whole_chain(pair, opened, batch, cross, monkeypatch):
    """Central differences of Eq. 5 at a weight of each tensor, pictures kept inside [0, 1] (there a
    clamp is kept open on purpose, and differences would see it shut)."""
    decode = pair[1].decode
    monkeypatch.setattr(pair[1], "decode", lambda z: decode(z) * .2 + .4)

    def value():
        return losses.joint(*pair, cross, two, ALL, split=False)[0].item()

    two = part(batch, [1, 2])
    losses.joint(*pair, cross, two, ALL)[0].backward()
    parameters = [ps[i] for ps in opened.values() for i in (0, -1)]
    grads = [p.grad.flatten().clone() for p in parameters]
    for p, grad in zip(parameters, grads):
        i = grad.abs().argmax().item()
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                p.view(-1)[i] += step
                ends.append(value())
                p.view(-1)[i] -= step
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(grad[i].item(), rel=1e-5)


def test_unknown_losses_are_refused(pair, batch):
    for weights in ({}, {"xx": 1}):
        with pytest.raises(ValueError, match="choose some of tg, ir, ig, tr"):
            losses.joint(*pair, None, batch, weights)
