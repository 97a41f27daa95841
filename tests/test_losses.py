"""The losses against the libraries' own, the formulas in float64, one graph, and finite differences."""
import pytest
import torch
from conftest import ROOT
from diffusers import DDIMScheduler

import bridge
import cycle
import losses
from miniature import world

ALL = dict.fromkeys(losses.NAMES, 1.0)


@pytest.fixture(scope="module")
def pair():
    """Both sides of the miniature in float64, with the query projections of cross-attention open."""
    captioner = cycle.Captioner.load(ROOT / "miniature/blip", "cpu", torch.float64)
    generator = cycle.Generator.load(ROOT / "miniature/sd", "cpu", torch.float64)
    return captioner, generator


@pytest.fixture()
def opened(pair):
    captioner, generator = pair
    found = {"captioner": [p for n, p in captioner.model.named_parameters() if ".crossattention.self.query." in n],
             "generator": [p for n, p in generator.unet.named_parameters() if ".attn2.to_q." in n]}
    for p in sum(found.values(), []):
        p.requires_grad_().grad = None
    yield found
    for p in sum(found.values(), []):
        p.requires_grad_(False).grad = None


@pytest.fixture(scope="module")
def way(pair):
    captioner, generator = pair
    return bridge.Bridge(captioner.tokenizer, generator.tokenizer, generator.text_encoder.get_input_embeddings().weight,
                         size=len(captioner.head.weight), begin=captioner.prompt[0], end=captioner.end)


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
    lay = way.layout(said, len(captioner.prompt) - 1)
    return losses.Batch(said, images[:4].double(), lay, mean, torch.randn_like(mean), torch.tensor([20, 300, 600, 990]))


def part(batch, rows):
    """Some samples of a batch, laid out on their own."""
    lay = bridge.replace(batch.layout, **{k: v[rows] for k, v in vars(batch.layout).items()})
    length = int((lay.source >= 0).any(0).nonzero().max()) + 1               # positions as the captioner would pad them
    lay = bridge.replace(lay, source=lay.source[:, :length], align=lay.align[:, :, :length])
    return losses.Batch([batch.captions[i] for i in rows], batch.images[rows], lay, batch.latents[rows],
                        batch.noise[rows], batch.timesteps[rows], batch.heard if batch.heard is None else
                        batch.heard[rows])


def gradient(opened):
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in sum(opened.values(), [])]
    for p in sum(opened.values(), []):
        p.grad = None
    return grads


def far(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b))


# ---------------------------------------------------------------- against the libraries
def test_caption_loss_is_blips_own(captioner, images):
    for image, said in zip(images[:3], ("a red ring", "a tiny blue heart above a green cross", "a box")):
        ids = torch.tensor([[*captioner.prompt, *captioner.tokenizer(said, add_special_tokens=False).input_ids,
                             captioner.end]])
        labels = ids.clone()
        labels[:, :len(captioner.prompt)] = -100
        own = captioner.model.text_decoder(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids),
                                           encoder_hidden_states=captioner.look(image[None])).loss
        ours = losses.caption_loss(captioner.read(image[None], [said]))
        assert ours.item() == pytest.approx(own.item(), rel=1e-5) and ours.item() > .1


def test_caption_loss_is_blip2s_own(blip2, images):
    captioner = cycle.Captioner.load(blip2, "cpu")
    ids = [*captioner.prompt, *captioner.tokenizer(" a red ring", add_special_tokens=False).input_ids, captioner.end]
    image_token = captioner.model.config.image_token_index
    ids = torch.tensor([[image_token] * captioner.model.config.num_query_tokens + ids])
    labels = ids.clone()
    labels[:, :captioner.model.config.num_query_tokens + len(captioner.prompt)] = -100
    own = captioner.model(pixel_values=captioner.pixels(images[:1]), input_ids=ids, labels=labels,
                          attention_mask=torch.ones_like(ids)).loss
    ours = losses.caption_loss(captioner.read(images[:1], ["a red ring"]))
    assert ours.item() == pytest.approx(own.item(), rel=1e-5)


def test_fused_and_plain_caption_losses_agree(pair, batch, cross):
    reading = pair[0].read(batch.images, batch.captions)
    _, ce = cross(reading, batch.layout)
    assert far([losses.per_caption(ce, reading.targets)], [losses.caption_loss(reading)]) < 1e-10


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusion_is_the_schedulers(kind):
    """Noised and target equal diffusers' own; a perfect prediction gives the image back, at every timestep."""
    scheduler = DDIMScheduler(prediction_type=kind, beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012)
    torch.manual_seed(0)
    t = torch.arange(1000)
    x, noise = torch.randn(2, 1000, 2, 3, 3, dtype=torch.float64)
    noised, goal = losses.add_noise(scheduler, x, noise, t), losses.target(scheduler, x, noise, t)
    assert far([noised], [scheduler.add_noise(x, noise, t)]) < 1e-12
    own = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x, noise, t), "sample": x}[kind]
    assert far([goal], [own]) < 1e-12
    assert far([losses.one_step(scheduler, noised, goal, t)], [x]) < 1e-10
    a = scheduler.alphas_cumprod[700].item()                                 # Section 4.2, in plain numbers
    if kind == "epsilon":
        by_hand = (noised[700] - (1 - a) ** .5 * .3) / a ** .5
        assert far([losses.one_step(scheduler, noised[[700]], torch.full_like(x[[700]], .3), t[[700]])[0]],
                   [by_hand]) < 1e-10


# ---------------------------------------------------------------- who is reached
@pytest.mark.parametrize("name, reached", [("tg", {"captioner"}), ("ir", {"captioner", "generator"}),
                                           ("ig", {"generator"}), ("tr", {"captioner", "generator"})])
def test_who_is_reached(pair, opened, batch, cross, name, reached):
    total, _ = losses.joint(*pair, cross, batch, {name: 1.0})
    total.backward()
    moved = {side for side, ps in opened.items() if all(p.grad is not None and p.grad.norm() > 1e-9 for p in ps)}
    still = {side for side, ps in opened.items() if all(p.grad is None for p in ps)}
    assert moved == reached and still == set(opened) - reached
    open_now = {id(p) for p in sum(opened.values(), [])}
    every = [p for m in (pair[0].model, *pair[1].pipe.components.values()) if isinstance(m, torch.nn.Module)
             for p in m.parameters()]
    assert not [p for p in every if p.grad is not None and id(p) not in open_now] and len(every) > 100


def test_a_subset_pays_only_for_what_it_uses(pair, opened, batch, cross, monkeypatch):
    captioner, generator = pair
    bare = losses.Batch(batch.captions, batch.images)
    tg = losses.joint(captioner, None, None, bare, {"tg": 1})[1]["tg"]       # no generator at all
    bare = losses.Batch(batch.captions, None, None, batch.latents, batch.noise, batch.timesteps)
    ig = losses.joint(None, generator, None, bare, {"ig": 1})[1]["ig"]       # no captioner, no pictures
    sizes, passes = [], []
    predict, read = generator.predict, captioner.read
    monkeypatch.setattr(generator, "predict", lambda x, *a: sizes.append(len(x)) or predict(x, *a))
    monkeypatch.setattr(captioner, "read", lambda *a: passes.append(len(a[1])) or read(*a))
    losses.joint(captioner, generator, cross, batch, {"ir": 1})
    each = losses.joint(captioner, generator, cross, batch, ALL, chunk=3)[1]
    assert sizes == [4, 8] and passes == [4, 4, 3, 1]                        # one UNet call; tg and ir share a reading
    assert far([each["tg"], each["ig"]], [tg, ig]) < 1e-10


def test_a_certain_captioner_makes_ir_ig(pair, opened, batch):
    """If the bridge gave exactly the human caption, Eq. 2 would be Eq. 3: same noised image, timestep and noise."""
    captioner, generator = pair

    def cross(reading, layout):
        return generator.states(batch.captions), reading.hidden.new_zeros(reading.targets.shape)
    each = losses.joint(captioner, generator, cross, batch, ALL)[1]
    assert torch.equal(each["ir"], each["ig"]) and (each["ig"] > 0).all()


# ---------------------------------------------------------------- the split backward
def test_split_is_one_graph(pair, opened, batch, cross):
    weights = {"tg": .5, "ir": 2.0, "ig": 1.0, "tr": .7}
    total, each = losses.joint(*pair, cross, batch, weights, split=False)
    assert total.item() == pytest.approx(sum(w * each[k].sum().item() for k, w in weights.items()), rel=1e-12)
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


def test_thinned_tr_is_that_of_the_samples_heard(pair, opened, batch, cross):
    some = part(batch, [0, 1, 2, 3])
    some.heard = torch.tensor([0.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    total, each = losses.joint(*pair, cross, some, {"tr": 1.0})
    total.backward()
    thin = gradient(opened)
    total, alone = losses.joint(*pair, cross, part(batch, [1]), {"tr": 2.0})
    total.backward()
    assert far(gradient(opened), thin) < 1e-10
    assert each["tr"].isnan().tolist() == [True, False, True, True]
    assert each["tr"][1].item() == pytest.approx(alone["tr"].item(), rel=1e-10)
    some.heard = torch.zeros(4, dtype=torch.float64)
    losses.joint(*pair, cross, some, {"tr": 1.0})[0].backward()
    assert not any(g.any() for g in gradient(opened))


def test_numerical_gradient_of_the_whole_chain(pair, opened, batch, cross):
    """Central differences of Eq. 5 at a weight of each tensor, pictures kept inside [0, 1] (there a clamp is kept open
    on purpose, and differences would see it shut)."""
    def decode(z):
        return pair[1].decode(z) * .2 + .4

    some, wants = part(batch, [1, 2]), []
    losses.joint(*pair, cross, some, ALL, decode=decode)[0].backward()
    parameters = [ps[i] for ps in opened.values() for i in (0, -1)]
    for p in parameters:
        wants.append(p.grad.flatten()[p.grad.abs().argmax()].item())
    places = [p.grad.abs().argmax().item() for p in parameters]
    for p, i, want in zip(parameters, places, wants):
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                p.view(-1)[i] += step
                ends.append(losses.joint(*pair, cross, some, ALL, split=False, decode=decode)[0].item())
                p.view(-1)[i] -= step
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(want, rel=1e-5)


def test_unknown_losses_are_refused(pair, batch):
    for weights in ({}, {"xx": 1}):
        with pytest.raises(ValueError, match="choose some of tg, ir, ig, tr"):
            losses.joint(*pair, None, batch, weights)
