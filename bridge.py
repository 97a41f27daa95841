"""The bridge: from a captioner's token distributions to what a generator's text encoder reads (Section 4.1).

    bridge = Bridge(tokenizer, clip_tokenizer, text_encoder.get_input_embeddings().weight, size=V)
    lay = bridge.layout(captions, lead=prompt_length - 1)            # on the CPU, in the data loader
    embeddings, ce, p = bridge(hidden, head.weight, head.bias, lay)  # (B, T, D), (B, L), (B, L)
    states = soft_states(text_encoder, embeddings, lay.target)       # (B, T, D), the UNet's context in L_IR
    caption_losses = ce.sum(1) / (lay.source >= 0).sum(1)            # (B,), L_TG of each caption

Teacher forcing: `hidden` are the captioner's last states before its vocabulary head; hidden[:, i] predicts
the token read at i + 1. Everything is counted by the predicting position: lay.source[:, i] is the human token
that hidden[:, i] should predict, soft[:, i] the distribution in its place. `lead` is the number of positions
before the one that predicts a caption's first token (BLIP: [DEC] a picture of -> 3).

Copy this file alone: it needs torch and two fast `transformers` tokenizers (WordPiece, byte-level, CLIP).

    python bridge.py                                                 # the miniature's two tokenizers
    python bridge.py --source bert/ --target clip/ "a skateboarder's dog"

prints, slot by slot, which pieces of the captioner each token of the generator is tied to and what the
paper's matrix puts there; then the fused product beside the plain one at the paper's size: MiB, seconds,
difference (10 s).

Letters: B captions; L positions of the captioner, T slots of the text encoder (CLIP: 77); V, U vocabularies
of the captioner and the generator; H, D widths of captioner and text encoder; N = B L; C words of V at once.
"""
import argparse
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------- the idea: three ways across
# The paper multiplies the distribution g_t with the generator's embeddings, the vocabularies matched by a
# fixed matrix M: soft = g M E = g T. But two tokenizers cut a third of the captions at different places, so
# that the generator reads what it was never trained on even where the captioner is certain.
def plain(soft, p, lay, table, embeddings):
    """The paper's connection: soft embeddings in a row between begin and end. Shapes as in `anchored`."""
    return lay.align @ soft + (1 - lay.align.sum(2, keepdim=True)) * embeddings[lay.target]   # (B, T, D)


def anchored(soft, p, lay, table, embeddings):
    """The default: the human prompt E[c], moved by what the distribution says beside the human token a.

    E[c] + A (soft - p T[a]) - A (1 - p) E[c]: of a slot's mass, the share p that the captioner gives the
    human pieces stays on the human token's own embedding, the rest goes where the distribution puts it. At
    one-hot this is the generator's own prompt. soft (B, L, D), p (B, L), T (V, D), E (U, D) -> (B, T, D).
    """
    # Differs: the paper has no anchor. A slot tied to k pieces takes a k-th of each piece's gradient.
    prompt = embeddings[lay.target].to(soft.dtype)                                            # (B, T, D)
    moved = lay.align @ (soft - p[..., None] * table[lay.source.clamp(min=0)])                # (B, T, D)
    return prompt + moved - lay.align @ (1 - p[..., None]) * prompt


def word(soft, p, lay, table, embeddings):
    """Straight through by words: `lay` is the layout of the captioner's own best tokens (`Bridge` finds it).

    Where the pieces tied to a slot say just its token (A T[a] = E[c]; most words): the soft mixture A soft.
    Elsewhere: forward E[c], backward the mixture.
    """
    prompt = embeddings[lay.target].to(soft.dtype)                                            # (B, T, D)
    mixed, sure = lay.align @ soft, lay.align @ table[lay.source.clamp(min=0)].to(soft.dtype)
    return torch.where((sure == prompt).all(2, keepdim=True), mixed, prompt + (mixed - mixed.detach()))


KINDS = {"anchored": anchored, "plain": plain, "word": word}


class Bridge:
    """All that lies between a captioner's head and a generator's text encoder: frozen, no parameters.

    source, target: the tokenizers. embeddings: (U, D), the text encoder's, used in place. size: V, the rows
    of the captioner's head where they are more than its tokenizer's. begin, end: the ids around a caption
    where the source tokenizer does not say so (BLIP begins with [DEC], BLIP-2 ends with a line break). kind:
    one of KINDS. length: T, default the target tokenizer's. chunk: memory against speed, not the result.
    Raises ValueError.
    """

    def __init__(self, source, target, embeddings, size=None, kind="anchored", begin=None, end=None,
                 length=None, chunk=4096):
        if kind not in KINDS:
            raise ValueError(f"bridge {kind!r} is unknown: choose one of {', '.join(KINDS)}")
        self.source, self.target, self.kind, self.length, self.chunk = source, target, kind, length, chunk
        self.end = role(source, "sep", "eos") if end is None else end
        self.embeddings = embeddings.detach()                                                 # (U, D)
        self.table = fold(vocabulary_map(source, target, size, begin, self.end), self.embeddings)  # (V, D)

    def layout(self, captions, lead=0, room=None):
        """Captions (strings, or lists of the captioner's ids with their end) -> Layout, on the CPU.

        room: most tokens the captioner reads of a string, its end not counted; slots beyond stay as they are.
        """
        if isinstance(captions, str) or not captions or any(isinstance(c, str) for c in captions):
            heard = hear(captions, self.source, self.end, room)
        else:
            heard = [spell(c, self.pieces, self.end) for c in captions]
        return layout(heard, self.target, self.length, lead, self.kind)

    def __call__(self, hidden, head_weight, head_bias, lay, smoothing=0.0):
        """hidden (B, L, H), head (V, H) and (V,) or None, lay on that device -> embeddings (B, T, D), ce, p.

        ce, p (B, L): the caption's cross-entropies and probabilities, as of `soft_embed`. Differentiable in
        hidden and head. `word` takes the best tokens to the CPU to read them; the others never wait for a
        device.
        """
        if lay.source.shape != hidden.shape[:2]:
            raise ValueError(f"the layout has (captions, positions) {tuple(lay.source.shape)}, hidden has "
                             f"{tuple(hidden.shape[:2])}: give layout the captions, lead and room as read")
        head = head_weight, head_bias
        soft, ce, p = soft_embed(hidden, *head, self.table, lay.source, smoothing, self.chunk)
        if self.kind == "word":
            lay = self.reread(best(hidden, *head, self.chunk), lay)
        lay = replace(lay, align=lay.align.to(soft))
        return KINDS[self.kind](soft, p, lay, self.table, self.embeddings), ce, p

    def reread(self, ids, lay):
        """The layout of the captioner's best tokens (B, L), at the positions of the human caption."""
        keep = (lay.source >= 0).cpu()                                                        # (B, L)
        rows = [row[k].tolist() for row, k in zip(ids.cpu(), keep)]
        return self.layout(rows, int(keep[0].int().argmax())).to(ids.device)

    @cached_property
    def pieces(self):
        return pieces(self.source)


def soft_states(text_encoder, embeddings, ids=None):
    """States (B, T, D) of a stock text encoder that reads embeddings (B, T, D), not its own: pi(g) of Eq. 2.

    CLIPTextModel takes no `inputs_embeds`, so a hook on its embedding layer answers for it while it runs. ids
    (B, T): for models that look for the end in them. One-hot input gives exactly the states of its ids.
    """
    layer = text_encoder.get_input_embeddings()
    if embeddings.ndim != 3 or embeddings.shape[2] != layer.weight.shape[1]:
        raise ValueError(f"embeddings {tuple(embeddings.shape)} must be (B, T, {layer.weight.shape[1]}): "
                         "build the bridge from this text encoder's own embeddings")
    if ids is None:
        ids = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    hook = layer.register_forward_hook(lambda layer, args, out: embeddings.to(out.dtype))
    try:
        return text_encoder(ids).last_hidden_state
    finally:
        hook.remove()


# ---------------------------------------------------------------- the fused product
class Fused(torch.autograd.Function):
    """softmax(h W^T + b) T and the log of the softmax's sum, by chunks of V, computed again in backward.

    (B, L, V) never exists: maximum and sum run along, and what was summed before is shrunk to a new maximum.
    Five products of N H V against the plain way's four. bf16 and fp16 are multiplied and summed in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, table, chunk):
        h = flat(hidden)                                                                      # (N, H)
        top, total = h.new_full((len(h), 1), -torch.inf), h.new_zeros(len(h), 1)              # (N, 1)
        soft = h.new_zeros(len(h), table.shape[1])                                            # (N, D)
        with torch.autocast(h.device.type, enabled=False):
            for i in range(0, len(weight), chunk):
                z = logits(h, weight, bias, i, i + chunk)                                     # (N, C)
                higher = torch.maximum(top, z.amax(1, keepdim=True))
                shrink, z = (top - higher).exp_(), z.sub_(higher).exp_()
                soft.mul_(shrink).addmm_(z, table[i:i + chunk].to(h))
                total.mul_(shrink).add_(z.sum(1, keepdim=True))
                top = higher
        soft = soft.div_(total).view(*hidden.shape[:-1], -1)                                  # (B, L, D)
        lse = (top + total.log()).view(hidden.shape[:-1])                                     # (B, L)
        ctx.save_for_backward(hidden, weight, bias, table, soft, lse)
        ctx.chunk = chunk
        return soft, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dsoft, dlse):
        hidden, weight, bias, table, soft, lse = ctx.saved_tensors
        h, g, lse = flat(hidden), flat(dsoft), lse.reshape(-1, 1)
        rest = dlse.reshape(-1, 1) - (g * flat(soft)).sum(1, keepdim=True)                    # (N, 1)
        dh = torch.zeros_like(h)
        dweight, dbias, dtable = (torch.empty_like(x) if need else None
                                  for x, need in zip((weight, bias, table), ctx.needs_input_grad[1:4]))
        with torch.autocast(h.device.type, enabled=False):
            for i in range(0, len(weight), ctx.chunk):
                j = i + ctx.chunk
                prob = logits(h, weight, bias, i, j).sub_(lse).exp_()                         # (N, C)
                if dtable is not None:
                    dtable[i:j] = prob.T @ g
                dz = prob.mul_(torch.addmm(rest, g, table[i:j].to(h).T))                      # (N, C)
                dh.addmm_(dz, weight[i:j].to(h))
                if dweight is not None:
                    dweight[i:j] = dz.T @ h
                if dbias is not None:
                    dbias[i:j] = dz.sum(0)
        return dh.view(hidden.shape).to(hidden.dtype), dweight, dbias, dtable, None


def flat(x):
    """(..., H) -> (N, H), in float32, or float64 if it comes so."""
    return x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))


def logits(h, weight, bias, i, j):
    """Columns i to j of h W^T + b, in the precision of h: (N, C)."""
    w = weight[i:j].to(h).T
    return h @ w if bias is None else torch.addmm(bias[i:j].to(h), h, w)


def soft_embed(hidden, head_weight, head_bias, table, targets=None, smoothing=0.0, chunk=4096):
    """Soft embeddings g T (Section 4.1) and, of the same pass, the caption loss (Eq. 1 and 4).

    hidden (B, L, H), head (V, H) and (V,) or None, table (V, D), targets (B, L) int64, -100 where nothing is
    said -> soft (B, L, D); ce (B, L), cross-entropies in nats, with label smoothing in [0, 1); p (B, L), the
    targets' probabilities. ce and p are 0 at -100, None without targets. All float32, or float64 for float64.
    Gradients reach hidden, and head and table where they ask for one. For a temperature, divide hidden and
    bias by it.
    """
    if hidden.shape[-1] != head_weight.shape[1] or len(head_weight) != len(table):
        raise ValueError(f"hidden {tuple(hidden.shape)}, head {tuple(head_weight.shape)}, table "
                         f"{tuple(table.shape)} must be (B, L, H), (V, H), (V, D): build it with size = V")
    if chunk < 1:
        raise ValueError(f"chunk {chunk}: give a number of words, 1 or more")
    soft, lse = Fused.apply(hidden, head_weight, head_bias, table, chunk)
    if targets is None:
        return soft, None, None
    y, quiet, h = targets.clamp(min=0), targets < 0, hidden.to(soft.dtype)
    bias = head_weight.new_zeros(1).expand(len(head_weight)) if head_bias is None else head_bias
    said = (h * head_weight[y]).sum(-1) + bias[y] - lse                                       # (B, L)
    ce = -said
    if smoothing:                              # the mean over V of all logits is the logit of the mean word
        mean = h @ head_weight.mean(0, dtype=h.dtype) + bias.mean(dtype=h.dtype)
        ce = (1 - smoothing) * ce + smoothing * (lse - mean)
    return soft, ce.masked_fill(quiet, 0), said.exp().masked_fill(quiet, 0)


def soft_embed_plain(hidden, head_weight, head_bias, table, targets, smoothing=0.0):
    """The same as the paper writes it, by torch's own softmax and cross-entropy: the reference."""
    z = F.linear(hidden, head_weight, head_bias)                                              # (B, L, V)
    g = z.softmax(-1)
    ce = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing)
    p = g.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return g @ table, ce.view(targets.shape), p.masked_fill(targets < 0, 0)


@torch.no_grad()
def best(hidden, head_weight, head_bias, chunk=4096):
    """The likeliest token at each position: (B, L) int64."""
    h = flat(hidden)
    starts = range(0, len(head_weight), chunk)
    found = [logits(h, head_weight, head_bias, i, i + chunk).max(1) for i in starts]
    values, ids = (torch.stack(x) for x in zip(*found))                                       # (V / C, N)
    part = values.argmax(0, keepdim=True)
    return (ids.gather(0, part) + part * chunk).view(hidden.shape[:-1])


# ---------------------------------------------------------------- from one vocabulary to the other
def vocabulary_map(source, target, size=None, begin=None, end=None):
    """Sparse M (V, U) float32: a row spreads a piece evenly over the target's tokens of its text; sums to 1.

    Specials go by role: begin to begin, end and padding to end; others, and rows up to `size` that have no
    name, to the target's unknown (CLIP: its end). begin, end: one more source id each. ValueError for a short
    size.
    """
    # Differs: the paper's file (Appendix G) maps 58 % of the words to [UNK] and loses mass; this is built.
    first, last = role(target, "bos", "cls", "eos"), role(target, "eos", "sep")
    unknown = role(target, "unk", "eos", "sep")
    rows = target([p.text for p in pieces(source)], add_special_tokens=False, verbose=False).input_ids
    if size is not None and size < len(rows):
        raise ValueError(f"size {size} is less than the source tokenizer's {len(rows)}: is it of this model?")
    rows = [row or [unknown] for row in rows] + [[unknown]] * ((size or 0) - len(rows))
    names = {"bos": first, "cls": first, "eos": last, "sep": last, "pad": last}
    ours = [(getattr(source, f"{name}_token_id", None), goal) for name, goal in names.items()]
    for i, goal in [*ours, (begin, first), (end, last)]:
        if i is not None:
            rows[i] = [goal]
    count = torch.tensor([len(row) for row in rows])
    share, piece = (x.repeat_interleave(count) for x in (1 / count, torch.arange(len(rows))))
    index, shape = torch.stack([piece, torch.tensor([t for row in rows for t in row])]), (len(rows), len(target))
    return torch.sparse_coo_tensor(index, share, shape, check_invariants=True).coalesce()


def fold(vocabulary, embeddings):
    """T = M E (V, D), what a piece looks like to the text encoder: M (V, U) sparse, E (U or more, D)."""
    if len(embeddings) < vocabulary.shape[1]:
        raise ValueError(f"{len(embeddings)} embeddings, but the target tokenizer has {vocabulary.shape[1]} "
                         "tokens: is it of this model?")
    e = embeddings[:vocabulary.shape[1]].to(torch.promote_types(embeddings.dtype, torch.float32))
    return torch.sparse.mm(vocabulary.to(e), e).to(embeddings.dtype)


class Piece(NamedTuple):
    text: str                                    # "" for a special token
    before: bool                                 # may a space stand before it, and
    after: bool                                  # after it


def pieces(tokenizer):
    """The text of each id and how it joins its neighbours, as the decoder puts it between words."""
    a, z = (tokenizer(x, add_special_tokens=False).input_ids for x in ("a", " a"))
    ids = [a + [i] + z for i in range(len(tokenizer))]
    skip, tail = len(tokenizer.decode(a)), len(tokenizer.decode(z).strip())
    said = [s.rstrip()[skip:-tail] for s in tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)]
    for i in tokenizer.all_special_ids:
        said[i] = ""
    # An apostrophe joins: decoders leave "man ' s", which the generator would read as three words.
    return [Piece(s.strip(), *(x.isspace() and s.strip() != "'" for x in (s[:1], s[-1:]))) for s in said]


def role(tokenizer, *names):
    """The first of these special ids (bos, cls, eos, sep, pad, unk) a tokenizer has; ValueError if none."""
    for name in names:
        if getattr(tokenizer, f"{name}_token_id", None) is not None:
            return getattr(tokenizer, f"{name}_token_id")
    raise ValueError(f"{type(tokenizer).__name__} has none of the tokens {', '.join(names)}: set one on it")


# ---------------------------------------------------------------- layouts: which slot is tied to which piece
@dataclass
class Layout:
    """A batch of captions on both sides, and the ties between them."""
    source: torch.Tensor                  # (B, L) int64, a: what is to be predicted; -100: nothing
    target: torch.Tensor                  # (B, T) int64, c: the prompt, padded as in the generator's training
    align: torch.Tensor                   # (B, T, L) float32, A: rows sum to 1, or 0 where nothing is tied

    def to(self, device):
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in vars(self).items()})


class Heard(NamedTuple):
    text: str
    ids: list                                    # the captioner's, its end included
    spans: list                                  # (from, to) in text; the end is a character after the last


def hear(captions, tokenizer, end, room=None):
    """Captions as the captioner's tokenizer cuts them, at most `room` tokens and the end: list of Heard."""
    if isinstance(captions, str) or not captions or not all(isinstance(c, str) for c in captions):
        raise ValueError("captions must be a list of strings, or a list of lists of token ids, and not empty")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} gives no offsets: load the model's fast tokenizer")
    read = tokenizer(list(captions), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    last = [(len(c), len(c) + 1) if ids == ids[:room] else (0, 0) for c, ids in zip(captions, read.input_ids)]
    return [Heard(c, ids[:room] + [end], spans[:room] + [e])
            for c, ids, spans, e in zip(captions, read.input_ids, read.offset_mapping, last)]


def spell(ids, pieces, end):
    """The text that ids stand for, and where each stands in it. Specials and nameless ids are silent."""
    text, spans, space = "", [], False
    for i in ids:
        piece = pieces[i] if i < len(pieces) else Piece("", False, False)
        text += " " if piece.text and piece.before and space else ""
        spans.append((len(text), len(text) + len(piece.text)))
        text, space = text + piece.text, piece.after if piece.text else space
    if ids and ids[-1] == end:
        spans[-1] = (len(text), len(text) + 1)
    return Heard(text, list(ids), spans)


def layout(heard, target, length=None, lead=0, kind="anchored"):
    """B captions as the captioner reads them -> Layout over L = lead + longest positions, T = length slots.

    A slot's row of A is its overlap with each piece, in characters, divided by their sum; the end is tied to
    the end unless the caption was cut on either side; begin and padding are tied to nothing. For kind "plain"
    the pieces stand in a row. length: T, default the target tokenizer's. ValueError if it holds no caption.
    """
    length = target.model_max_length if length is None else length
    if not 3 <= length <= 4096:
        raise ValueError(f"a prompt of {length} slots: give length, what the text encoder reads (CLIP: 77)")
    heard, prompts = (in_a_row if kind == "plain" else tokenized)(heard, target, length)
    width, pad = lead + max(len(h.ids) for h in heard), role(target, "pad", "eos")
    s = torch.tensor([fill([(0, 0)] * lead + h.spans, (0, 0), width) for h in heard])[:, None]  # (B, 1, L, 2)
    t = torch.tensor([fill(spans, (0, 0), length) for _, spans in prompts])[:, :, None]         # (B, T, 1, 2)
    shared = (torch.minimum(s[..., 1], t[..., 1]) - torch.maximum(s[..., 0], t[..., 0])).clamp(min=0)
    return Layout(torch.tensor([fill([-100] * lead + h.ids, -100, width) for h in heard]),
                  torch.tensor([fill(ids, pad, length) for ids, _ in prompts]),
                  shared / shared.sum(2, keepdim=True).clamp(min=1))                          # (B, T, L)


def tokenized(heard, target, length):
    """The generator's own tokens of the texts, with begin and end, cut to length as its tokenizer cuts."""
    read, prompts = target([h.text for h in heard], return_offsets_mapping=True, verbose=False), []
    for h, ids, spans in zip(heard, read.input_ids, read.offset_mapping):
        if len(ids) > length:
            ids, spans = ids[:length - 1] + ids[-1:], spans[:length - 1] + [(0, 0)]
        elif ids[-1:] == [role(target, "eos", "sep")]:
            spans = spans[:-1] + [(len(h.text), len(h.text) + 1)]
        prompts.append((ids, spans))
    return heard, prompts


def in_a_row(heard, target, length):
    """A slot for each piece after begin, the end among them; of too many, the last give way to an end."""
    *first, last = target("").input_ids
    room, places = length - len(first), [(i, i + 1) for i in range(max(len(h.ids) for h in heard))]
    fits = [len(h.ids) if len(h.ids) <= room else room - 1 for h in heard]
    return ([h._replace(spans=places[:len(h.ids)]) for h in heard],
            [(fill(first, last, len(first) + min(len(h.ids), room)), [(0, 0)] * len(first) + places[:n])
             for h, n in zip(heard, fits)])


def fill(row, value, length):
    return row + [value] * (length - len(row))


# ---------------------------------------------------------------- the doorbell
def slots(sentence, source, target):
    """A line for each slot of a sentence's prompt, and how many of them the plain matrix gets right."""
    heard = hear([sentence], source, role(source, "sep", "eos"))
    lay, row = layout(heard, target), layout(heard, target, kind="plain")
    vocabulary = vocabulary_map(source, target).index_select(0, lay.source[0]).to_dense()     # (L, U)
    own = target.convert_ids_to_tokens(lay.target[0].tolist())
    said = source.convert_ids_to_tokens(lay.source[0].tolist())
    lines, right = [f"slot  {'generator':18}{'tied to':44}the plain matrix puts"], 0
    for i in range(min(len(own), 1 + max(len(said), int(lay.align[0].any(1).nonzero().max())))):
        ties = " + ".join(f"{said[j]} {a:.2g}" for j, a in enumerate(lay.align[0, i].tolist()) if a)
        there = (row.align[0, i] @ vocabulary).nonzero()[:, 0].tolist() or row.target[0, i:i + 1].tolist()
        right += there == lay.target[0, i:i + 1].tolist()
        lines.append(f"{i:4}  {own[i]:18}{ties:44}{' + '.join(target.convert_ids_to_tokens(there))}")
    return [*lines, f"of {len(lines) - 1} slots the plain matrix gets {right} right, the anchored all", ""]


def peak(f):
    """What f() allocates at most beyond what it found, in bytes, on the CPU, as the allocator counts it."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as record:
        f()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def measure(chunk=4096, shape=(8, 40), words=30524, width=768, times=3):
    """Fused and plain, forward and backward, at the paper's size in float32: MiB, seconds, difference."""
    torch.manual_seed(0)
    sizes = ((words, width), (words,), (words, width), (*shape, width), (*shape, width))
    (weight, bias, table, x, way), y = (torch.randn(s) for s in sizes), torch.randint(words, shape)
    weight /= width ** .5

    def run(product, **options):
        hidden = x.clone().requires_grad_()
        soft, ce, p = product(hidden, weight, bias, table, y, **options)
        ((soft * way).sum() + ce.mean() + p.sum()).backward()
        return soft.detach(), ce.detach(), hidden.grad

    ways = {"plain": lambda: run(soft_embed_plain), f"fused {chunk}": lambda: run(soft_embed, chunk=chunk)}
    worst = max(((i - j).abs().max() / i.abs().max()).item() for i, j in zip(*(f() for f in ways.values())))
    lines = []
    for name, f in ways.items():
        clock = [(time.perf_counter(), f(), time.perf_counter()) for _ in range(times)]
        seconds = min(stop - start for start, _, stop in clock)
        lines.append(f"{name:12}{peak(f) / 2 ** 20:8.1f} MiB{seconds:8.2f} s")
    return [*lines, f"they differ by {worst:.0e} of the largest value (soft embeddings, losses, gradients)"]


def doorbell(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("sentence", nargs="?", default="a huge pink square below an orange heart on fresh snow")
    cli.add_argument("--source", default=HERE / "miniature/blip", help="the captioner's: directory or hub id")
    cli.add_argument("--target", default=HERE / "miniature/sd/tokenizer", help="the generator's, likewise")
    cli.add_argument("--chunk", type=int, default=4096, help="words at once: memory against speed")
    args = cli.parse_args(argv)
    try:
        for x in (args.source, args.target):
            if not Path(x).is_dir() and str(x).count("/") != 1:
                raise ValueError(f"{x} is neither a directory nor a hub id (owner/name): give a tokenizer's")
        from transformers import AutoTokenizer
        tokenizers = [AutoTokenizer.from_pretrained(x, trust_remote_code=False) for x in (args.source, args.target)]
        print("\n".join(slots(args.sentence, *tokenizers) + measure(args.chunk)))
    except (ValueError, OSError) as e:
        return print(f"bridge.py: {' '.join(str(e).split())}", file=sys.stderr) or 2
    return 0


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")                  # the profiler in `peak` talks to stderr
    sys.exit(doorbell())
