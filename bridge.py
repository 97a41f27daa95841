"""The bridge: from a captioner's token distributions to a generator's text states (Section 4.1).

    bridge = Bridge(tokenizer, clip_tokenizer, text_encoder.get_input_embeddings().weight, size=V)
    layout = bridge.layout(captions, lead=prompt_length - 1)            # on the CPU
    embeddings, ce, p = bridge(hidden, head.weight, head.bias, layout)  # (B, T, D), (B, L), (B, L)
    states = soft_states(text_encoder, embeddings, layout.target)   # (B, T, D), the UNet's
    caption_losses = ce.sum(1) / (layout.source >= 0).sum(1)        # (B,), L_TG of each caption

Teacher forcing: `hidden` are the captioner's last states before its vocabulary head; hidden[:, i]
should predict layout.source[:, i], the human token read at i + 1. `lead` is the number of positions
before the one that predicts a caption's first token (BLIP: [DEC] a picture of -> 3).

Copy this file alone: it needs torch and two fast `transformers` tokenizers.

    python bridge.py --source bert/ --target clip/ "a skateboarder's dog"   # or the miniature's

prints which pieces each slot of the prompt is tied to.

Letters: B captions; L positions of the captioner, T slots of the text encoder; V, U words of the
captioner and the generator; H, D widths of captioner and text encoder; N = B L; C of V at once.
"""
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).resolve().parent
NOWHERE = (0, 0)                       # a place in a text, from and to, that overlaps with no other
END = (1_000_000, 1_000_001)           # the end of every caption, behind its text


# ---------------------------------------------------------------- the idea: two ways across
# The paper multiplies the distribution g_t with the generator's embeddings, the vocabularies
# matched by a fixed matrix M: soft = g M E = g T. But two tokenizers cut a third of the captions at
# different places: the generator reads what it never met even where the captioner is certain.
def plain(soft, p, layout, table, embeddings):
    """The paper's connection: soft embeddings in a row between begin and end, as in `anchored`."""
    rest = 1 - layout.align.sum(2, keepdim=True)                    # (B, T, 1)
    return layout.align @ soft + rest * embeddings[layout.target]   # (B, T, D)


def anchored(soft, p, layout, table, embeddings):
    """The default: the human prompt E[c], moved by what the distribution says beside human token a.

    E[c] + A (soft - p T[a]) - A (1 - p) E[c]: of a slot's mass, the share p that the captioner
    gives the human pieces stays on the human token's own embedding, the rest goes where the
    distribution puts it. At one-hot this is the generator's own prompt.
    soft (B, L, D), p (B, L), T (V, D), E (U, D) -> (B, T, D).
    """
    # Differs: the paper has no anchor. A slot's gradient is shared by the pieces tied to it.
    prompt = embeddings[layout.target].to(soft.dtype)               # (B, T, D)
    human = table[layout.source.clamp(min=0)]                       # (B, L, D)
    moved = layout.align @ (soft - p[..., None] * human)            # (B, T, D)
    gone = layout.align @ (1 - p[..., None])                        # (B, T, 1)
    return prompt + moved - gone * prompt


KINDS = {"anchored": anchored, "plain": plain}


class Bridge:
    """All that lies between a captioner's head and a generator's text encoder: no parameters.

    source, target: the tokenizers. embeddings: (U, D), the text encoder's, used in place. size: V,
    rows of the captioner's head where they are more than its tokenizer's. begin, end: the ids
    around a caption where the source tokenizer does not say so (BLIP begins with [DEC], BLIP-2 ends
    with a line break). T is target.model_max_length. chunk: memory against speed.
    """
    def __init__(self, source, target, embeddings, size=None, kind="anchored", begin=None, end=None,
                 chunk=4096):
        if kind not in KINDS:
            raise ValueError(f"bridge {kind!r} is unknown: choose one of {', '.join(KINDS)}")
        self.source = source
        self.target = target
        self.kind = kind
        self.chunk = chunk
        self.end = special_id(source, "sep", "eos") if end is None else end
        self.embeddings = embeddings.detach()                       # (U, D)
        if len(embeddings) < len(target):
            raise ValueError(f"{len(embeddings)} embeddings, but the target tokenizer has "
                             f"{len(target)} tokens: is it of this model?")
        rows = vocabulary_map(source, target, size, begin, self.end)
        self.table = project(rows, self.embeddings)                 # (V, D)

    def layout(self, captions, lead=0, room=None):
        """Captions -> Layout, on the CPU. room: most tokens the captioner reads of each, its end
        not counted; slots beyond stay as they are."""
        return make_layout(captions, self.source, self.target, self.end, self.kind, lead, room)

    def __call__(self, hidden, head_weight, head_bias, layout):
        """hidden (B, L, H), head (V, H) and (V,) or None, layout on their device -> embeddings
        (B, T, D), ce, p (B, L) as of `soft_embed`. Differentiable in hidden and head."""
        if layout.source.shape != hidden.shape[:2]:
            raise ValueError(f"layout is of {layout.source.shape} (captions, positions), hidden of "
                             f"{hidden.shape[:2]}: give layout the captions, lead and room as read")
        soft, ce, p = soft_embed(hidden, head_weight, head_bias, self.table, layout.source,
                                 self.chunk)
        layout = replace(layout, align=layout.align.to(soft))
        cross = KINDS[self.kind]
        return cross(soft, p, layout, self.table, self.embeddings), ce, p


def soft_states(text_encoder, embeddings, ids):
    """States (B, T, D) of a stock text encoder that reads embeddings (B, T, D): pi(g) of Eq. 2.

    CLIPTextModel takes no `inputs_embeds`: a hook on its embedding layer answers while it runs. ids
    (B, T): for models that look for the end in them. One-hot input gives the states of its ids.
    """
    layer = text_encoder.get_input_embeddings()
    hook = layer.register_forward_hook(lambda layer, args, out: embeddings.to(out.dtype))
    try:
        return text_encoder(ids).last_hidden_state
    finally:
        hook.remove()


# ---------------------------------------------------------------- the fused product
class Fused(torch.autograd.Function):
    """softmax(h W^T + b) T and the log of the softmax's sum, by chunks of V, again in backward.

    (B, L, V) never exists: maximum and sum run along, and what was summed before is shrunk to a new
    maximum. Five products of N H V against the plain way's four. Half precision is multiplied and
    summed in float32. No gradient reaches T, which is frozen.
    """
    @staticmethod
    def forward(ctx, hidden, weight, bias, table, chunk):
        h = flat(hidden)                                            # (N, H)
        top = h.new_full((len(h), 1), -torch.inf)                   # (N, 1), the largest logit
        total = h.new_zeros(len(h), 1)                              # (N, 1), sum of exp(z - top)
        soft = h.new_zeros(len(h), table.shape[1])                  # (N, D)
        with torch.autocast(h.device.type, enabled=False):
            for i in range(0, len(weight), chunk):
                z = logits(h, weight, bias, i, i + chunk)           # (N, C)
                higher = torch.maximum(top, z.amax(1, keepdim=True))
                shrink = (top - higher).exp_()
                z = z.sub_(higher).exp_()
                soft.mul_(shrink).addmm_(z, table[i:i + chunk].to(h))
                total.mul_(shrink).add_(z.sum(1, keepdim=True))
                top = higher
        soft = soft.div_(total).view(*hidden.shape[:-1], -1)        # (B, L, D)
        lse = (top + total.log()).view(hidden.shape[:-1])           # (B, L)
        ctx.save_for_backward(hidden, weight, bias, table, soft, lse)
        ctx.chunk = chunk
        return soft, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dsoft, dlse):
        hidden, weight, bias, table, soft, lse = ctx.saved_tensors
        _, wants_weight, wants_bias, _, _ = ctx.needs_input_grad
        h = flat(hidden)                                            # (N, H)
        g = flat(dsoft)                                             # (N, D)
        lse = lse.reshape(-1, 1)                                    # (N, 1)
        mean = (g * flat(soft)).sum(1, keepdim=True)
        rest = dlse.reshape(-1, 1) - mean                           # (N, 1)
        dh = torch.zeros_like(h)
        dweight = torch.empty_like(weight) if wants_weight else None
        dbias = torch.empty_like(bias) if wants_bias else None
        with torch.autocast(h.device.type, enabled=False):
            for i in range(0, len(weight), ctx.chunk):
                j = i + ctx.chunk
                prob = logits(h, weight, bias, i, j).sub_(lse).exp_()   # (N, C)
                dz = prob.mul_(torch.addmm(rest, g, table[i:j].to(h).T))
                dh.addmm_(dz, weight[i:j].to(h))
                if wants_weight:
                    dweight[i:j] = dz.T @ h
                if wants_bias:
                    dbias[i:j] = dz.sum(0)
        return dh.view(hidden.shape).to(hidden.dtype), dweight, dbias, None, None


def flat(x):
    """(..., H) -> (N, H), in float32, or float64 if it comes so."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.reshape(-1, x.shape[-1]).to(wide)


def logits(h, weight, bias, i, j):
    """Columns i to j of h W^T + b, in the precision of h: (N, C)."""
    w = weight[i:j].to(h).T
    if bias is None:
        return h @ w
    return torch.addmm(bias[i:j].to(h), h, w)


def soft_embed(hidden, head_weight, head_bias, table, targets, chunk=4096):
    """Soft embeddings g T (Section 4.1) and, of the same pass, the caption loss (Eq. 1).

    hidden (B, L, H), head (V, H) and (V,) or None, table (V, D), targets (B, L) int64, -100 where
    nothing is said -> soft (B, L, D); ce (B, L), cross-entropies in nats; p (B, L), the targets'
    probabilities; both 0 at -100. All float32, or float64. Gradients reach hidden and head.
    """
    if len(head_weight) != len(table):
        raise ValueError(f"the head has {len(head_weight)} words, the table {len(table)}: "
                         "build the bridge with size = V")
    soft, lse = Fused.apply(hidden, head_weight, head_bias, table.detach(), chunk)
    y = targets.clamp(min=0)
    logit = (hidden.to(soft.dtype) * head_weight[y]).sum(-1)        # (B, L)
    if head_bias is not None:
        logit = logit + head_bias[y]
    log_p = logit - lse
    quiet = targets < 0
    ce = (-log_p).masked_fill(quiet, 0)
    p = log_p.exp().masked_fill(quiet, 0)
    return soft, ce, p


def soft_embed_plain(hidden, head_weight, head_bias, table, targets):
    """The same as the paper writes it, by torch's own softmax and cross-entropy: the reference."""
    z = F.linear(hidden, head_weight, head_bias)                    # (B, L, V)
    g = z.softmax(-1)
    ce = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none")
    y = targets.clamp(min=0)
    p = g.gather(2, y[..., None])[..., 0]                           # (B, L)
    p = p.masked_fill(targets < 0, 0)
    return g @ table, ce.view(targets.shape), p


# ---------------------------------------------------------------- from one vocabulary to the other
def vocabulary_map(source, target, size=None, begin=None, end=None):
    """M, as V lists of ids: the target's tokens of each piece's text, each an equal share of it.

    Specials go by role: begin to begin, end and padding to end; others, and pieces up to `size`
    that have no name, to the target's unknown. begin, end: one more source id each.
    """
    # Differs: the paper's file (Appendix G) maps 58 % of the words to [UNK] and loses mass.
    rows = target(piece_texts(source), add_special_tokens=False, verbose=False).input_ids
    size = len(rows) if size is None else size
    if size < len(rows):
        raise ValueError(f"size {size} is less than the source tokenizer's {len(rows)} pieces")
    unknown = special_id(target, "unk", "eos", "sep")
    rows = [row or [unknown] for row in rows]
    rows += [[unknown]] * (size - len(rows))
    first = special_id(target, "bos", "cls", "eos")
    last = special_id(target, "eos", "sep")
    goals = [(source.bos_token_id, first), (source.cls_token_id, first),
             (source.eos_token_id, last), (source.sep_token_id, last),
             (source.pad_token_id, last), (begin, first), (end, last)]
    for i, goal in goals:
        if i is not None:
            rows[i] = [goal]
    return rows


def project(rows, embeddings):
    """T = M E (V, D), what a piece looks like to the text encoder: the mean of its tokens."""
    e = flat(embeddings)                                            # (U, D)
    count = torch.tensor([len(row) for row in rows])                # (V,)
    piece = torch.arange(len(rows)).repeat_interleave(count)
    token = torch.tensor(list(chain(*rows)))
    share = 1 / count.to(e.dtype)[piece]
    m = torch.sparse_coo_tensor(torch.stack([piece, token]), share, (len(rows), len(e)),
                                check_invariants=True)
    return torch.sparse.mm(m.coalesce().to(e), e).to(embeddings.dtype)


def piece_texts(tokenizer):
    """The text of each id, as the decoder writes it between two words; "" for a special token."""
    before = tokenizer("a", add_special_tokens=False).input_ids
    after = tokenizer(" a", add_special_tokens=False).input_ids
    start = len(tokenizer.decode(before))
    stop = len(tokenizer.decode(after).strip())
    rows = [before + [i] + after for i in range(len(tokenizer))]
    decoded = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    texts = [text.rstrip()[start:-stop].strip() for text in decoded]
    for i in tokenizer.all_special_ids:
        texts[i] = ""
    return texts


def special_id(tokenizer, *names):
    """The first of these special ids (bos, cls, eos, sep, pad, unk) a tokenizer has."""
    for name in names:
        found = getattr(tokenizer, f"{name}_token_id", None)
        if found is not None:
            return found
    raise ValueError(f"{type(tokenizer).__name__} has none of the tokens {names}: set one on it")


# ---------------------------------------------------------------- which slot is tied to which piece
@dataclass
class Layout:
    """A batch of captions on both sides, and the ties between them."""
    source: torch.Tensor       # (B, L) int64, a: what is to be predicted; -100: nothing
    target: torch.Tensor       # (B, T) int64, c: the prompt, padded as in training
    align: torch.Tensor        # (B, T, L) float32, A: rows sum to 1, or 0: tied to nothing

    def to(self, device):
        return Layout(*[x.to(device, non_blocking=True) for x in vars(self).values()])


def make_layout(captions, source, target, end, kind="anchored", lead=0, room=None):
    """B captions -> Layout: L = lead + longest caption and end, T = target.model_max_length slots.

    A slot's row of A is its overlap with each piece, in characters, divided by their sum; end is
    tied to end unless the caption was cut on either side, begin and padding to nothing. For kind
    "plain" the pieces stand in a row.
    """
    if not 3 <= target.model_max_length <= 4096:
        raise ValueError(f"a prompt of {target.model_max_length} slots: set the target tokenizer's "
                         "model_max_length to what the text encoder reads")
    pieces, spans = tokenize(captions, source, end, lead, room)     # (B, L), (B, L, 2)
    if kind == "plain":
        prompt, align = in_a_row(pieces, target)
        return Layout(pieces, prompt, align)
    prompt, slots = tokenize_prompts(captions, target)              # (B, T), (B, T, 2)
    s = spans[:, None]                                              # (B, 1, L, 2)
    t = slots[:, :, None]                                           # (B, T, 1, 2)
    start = torch.maximum(s[..., 0], t[..., 0])                     # (B, T, L)
    stop = torch.minimum(s[..., 1], t[..., 1])
    shared = (stop - start).clamp(min=0)
    align = shared / shared.sum(2, keepdim=True).clamp(min=1)
    return Layout(pieces, prompt, align)


def tokenize(captions, tokenizer, end, lead=0, room=None):
    """Captions as the captioner reads them: ids (B, L), -100 before and after, and their places in
    the text, from and to (B, L, 2)."""
    if isinstance(captions, str) or not captions:
        raise ValueError("captions must be a list of strings, and not empty")
    read = tokenizer(list(captions), add_special_tokens=False, return_offsets_mapping=True,
                     verbose=False)
    ids, spans = [], []
    for row, places in zip(read.input_ids, read.offset_mapping):
        cut = room is not None and len(row) > room
        last = NOWHERE if cut else END
        row = [-100] * lead + row[:room] + [end]
        places = [NOWHERE] * lead + places[:room] + [last]
        ids.append(torch.tensor(row))
        spans.append(torch.tensor(places))
    return pad_sequence(ids, True, -100), pad_sequence(spans, True)


def tokenize_prompts(captions, target):
    """The generator's own tokens with begin and end, padded to length: ids, places in the text."""
    read = target(list(captions), padding="max_length", truncation=True,
                  return_offsets_mapping=True, return_tensors="pt")
    ids, spans = read.input_ids, read.offset_mapping                # (B, T), (B, T, 2)
    end = special_id(target, "eos", "sep")
    for b, encoding in enumerate(read.encodings):
        last = read.attention_mask[b].sum() - 1
        cut = encoding.overflowing                                  # it ends before the caption
        if not cut and ids[b, last] == end:
            spans[b, last] = torch.tensor(END)
    return ids, spans


def in_a_row(pieces, target):
    """Prompt and A of `plain`: a slot a piece after begin; of too many, the last ones go."""
    *begin, end = target("").input_ids
    length = target.model_max_length
    prompt = torch.full((len(pieces), length), special_id(target, "pad", "eos"))
    prompt[:, :len(begin)] = torch.tensor(begin)
    align = torch.zeros(len(pieces), length, pieces.shape[1])
    for b, row in enumerate(pieces):
        places = (row >= 0).nonzero()[:, 0]
        slots = torch.arange(len(begin), length)[:len(places)]
        prompt[b, slots] = end
        if len(slots) < len(places):
            slots = slots[:-1]
        align[b, slots, places[:len(slots)]] = 1
    return prompt, align


# ---------------------------------------------------------------- what it does to a sentence
def flags(cli, argv=None):
    cli.add_argument("sentence", nargs="?", help="what to show",
                     default="a huge pink square below an orange heart on fresh snow")
    cli.add_argument("--source", default=HERE / "miniature/blip", help="the captioner's")
    cli.add_argument("--target", default=HERE / "miniature/sd/tokenizer", help="the generator's")
    return cli.parse_args(argv)


def main(args):
    from transformers import AutoTokenizer
    tokenizers = []
    for place in (args.source, args.target):
        if not Path(place).is_dir() and "/" not in str(place):
            raise ValueError(f"{place} is neither a directory nor a hub id (owner/name)")
        tokenizers.append(AutoTokenizer.from_pretrained(place, trust_remote_code=False))
    source, target = tokenizers
    layout = make_layout([args.sentence], source, target, special_id(source, "sep", "eos"))
    slots = target.convert_ids_to_tokens(layout.target[0].tolist())
    pieces = source.convert_ids_to_tokens(layout.source[0].tolist())
    for i, (slot, row) in enumerate(zip(slots, layout.align[0].tolist())):
        tied = [f"{piece} {share:.2g}" for piece, share in zip(pieces, row) if share]
        if tied or i == 0:                       # the rest is padding
            print(f"{i:4}  {slot:18}{' + '.join(tied)}")
    return 0


if __name__ == "__main__":
    import script
    script.run(main, lambda: flags(script.Parser(__doc__)))
