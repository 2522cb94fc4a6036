"""Slow, obvious restatements that tests compare with: loops, dictionaries, formulas by hand.

Nothing here imports the script. A model, settings or tables are handed in, and only parameters,
settings and outputs of the network are read from them.
"""

import itertools
import math
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import torch

EPS = np.finfo(np.float32).eps
PRIMES = {
    "fixed": (36313, 27191, 51647, 81929, 131071, 65537, 104729),
    "backoff": (36313, 27191, 51647, 81929, 131071, 65537, 104729),
    "gated": (36313, 27191, 51647, 81929, 131071, 174763, 233017),
}


# --- the model ------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(scores):
    """Of one row."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def log_softmax(logits):
    """Of one row."""
    shifted = logits - logits.max()
    return shifted - math.log(np.exp(shifted).sum())


def rms_norm(x):
    mean_square = (x * x).mean(-1, keepdims=True)
    return x / np.sqrt(mean_square + EPS)


def attention(q, k, v, starts=(0,)):
    """One position, one head at a time. q [T, H, D], k, v [T, K, D] -> [T, H, D], in numpy.

    starts: no position looks back across one.
    """
    out = np.zeros_like(q)
    share = q.shape[1] // k.shape[1]
    for t, h in np.ndindex(q.shape[:2]):
        kv = h // share
        first = max(start for start in starts if start <= t)
        scores = k[first : t + 1, kv] @ q[t, h]
        weights = softmax(scores / math.sqrt(q.shape[2]))
        out[t, h] = weights @ v[first : t + 1, kv]
    return out


def masked_attention(q, k, v, mask):
    """Attention whose mask [T, T] is written out. q [B, T, H, D], k, v [B, T, K, D], in torch."""
    share = q.shape[2] // k.shape[2]
    keys = k.repeat_interleave(share, 2)
    values = v.repeat_interleave(share, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, keys) / math.sqrt(q.shape[3])
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, values)


def without_own_value(y, v):
    """XSA: what a head's output has along the value of its own position is taken out of it."""
    own = np.repeat(v, y.shape[1] // v.shape[1], axis=1)
    unit = own / np.linalg.norm(own, axis=-1, keepdims=True)
    along = (y * unit).sum(-1, keepdims=True)
    return y - along * unit


def rotary_angles(time, dims, base):
    """[T, dims / 2]"""
    exponents = -np.arange(0, dims, 2) / dims
    return np.outer(np.arange(time), base**exponents)


def bigram_row(token, before, rows, kind):
    """Row of a token after another (None: nothing before), in Python's unbounded integers."""
    if kind == "linear":
        return (token * 2654435761 + (before or 0) * 40503) % rows
    if before is None:
        return rows - 1
    key = (36313 * token) ^ (27191 * before)
    return key % (rows - 1)


def bigram_rows(ids, rows, kind="xor"):
    """Rows of one sequence."""
    tokens = [int(token) for token in ids]
    pairs = zip(tokens, [None, *tokens])
    return [bigram_row(token, before, rows, kind) for token, before in pairs]


def context_rows(ids, order, rows):
    """Rows of a hashed table of contexts: bits 33 to 63 of a polynomial, the sign among them."""
    found = []
    text = [0] * (order - 1) + list(ids)
    for t in range(len(ids)):
        key = 0
        for token in reversed(text[t : t + order]):  # the last token first
            key = key * 6364136223846793005 + token
        key = (key + 2**63) % 2**64 - 2**63
        found.append((key >> 33) % rows)
    return found


def followers(ids, orders, bos, reach):
    """What followed the last place of the document with the same last tokens, by looking back.

    -> of every place (token, number of the order), or (None, number of orders)
    """
    found = []
    before = [None] * max(orders)
    text = before + [int(token) for token in ids]
    for t in range(len(before), len(text)):
        answer = None, len(orders)
        for number, order in enumerate(orders):
            s = t - 1
            while s >= len(before) and t - s <= reach and text[s + 1] != bos and answer[0] is None:
                if text[s - order + 1 : s + 1] == text[t - order + 1 : t + 1]:
                    answer = text[s + 1], number
                s -= 1
        found.append(answer)
    return found


def smeared(x, gate, held):
    """Each position mixed with the one before it, except where it is held. x [T, D], gate [D]."""
    out = x.copy()
    for t in range(len(x)):
        if not held[t]:
            before = x[t - 1] if t else 0
            out[t] = (1 - gate) * x[t] + gate * before
    return out


class ForwardPass:
    """The whole forward pass of one sequence in float64 numpy, from the specification."""

    def __init__(self, model, ids, looped=False, starts=(0,)):
        self.cfg = model.cfg
        self.ids = ids
        self.looped = looped  # depth recurrence
        self.starts = starts  # of documents
        self.w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}

    def hidden(self):
        """-> [T, D]"""
        order = self.order()
        half = len(order) // 2
        x = self.embedded()
        start = x
        pushed = []
        lane = None
        for number, i in enumerate(order):
            if self.cfg.parallel_start_layer and number >= half and lane is None:
                lane = x if i >= self.cfg.parallel_start_layer else None
            if number >= half and pushed:
                x = self.skipped(number - half, pushed.pop(), x)
            if lane is None:
                x = self.block(i, x, start)
            else:
                x, lane = self.lanes(i, x, lane, start)
            if number < half and self.cfg.unet_skips:
                pushed.append(x)
        return rms_norm(x if lane is None else (x + lane) / 2)

    def order(self):
        """Layers as they are executed."""
        first, last = self.cfg.loop_start, self.cfg.loop_end
        order = []
        for i in range(self.cfg.num_layers):
            order.append(i)
            if self.looped and i == last:
                for _ in range(self.cfg.num_loops):
                    order += range(first, last + 1)
        return order

    def skipped(self, row, kept, x):
        kept = self.w["skip_weights"][row] * kept
        if not self.cfg.skip_gates_enabled:
            return x + kept
        gate = sigmoid(self.w["skip_gates"][row])
        return gate * x + (1 - gate) * kept

    def lanes(self, i, x, lane, start):
        mixing = self.of_block(i, "resid_mix")
        damping = 1 / math.sqrt(i + 1) if self.cfg.ln_scale else 1
        mixed = mixing[0] * x + mixing[1] * start
        attended = self.of_block(i, "attn_scale") * self.attend(i, rms_norm(mixed) * damping)
        widened = self.of_block(i, "mlp_scale") * self.mlp(i, rms_norm(lane) * damping)
        post = self.w["parallel_post_lambdas"][i]
        keep = self.w["parallel_resid_lambdas"][i]
        first = keep[0] * x + post[0, 0] * attended + post[1, 0] * widened
        second = keep[1] * lane + post[0, 1] * attended + post[1, 1] * widened
        return first, second

    def logits(self):
        """With the caps of scoring -> [T, V]"""
        z = self.hidden() @ self.w["tok_emb.weight"].T
        above = below = self.cfg.logit_softcap
        if self.cfg.asym_logit_rescale:
            above, below = self.w["softcap_pos"], self.w["softcap_neg"]
        return np.where(z >= 0, above * np.tanh(z / above), below * np.tanh(z / below))

    def embedded(self):
        x = self.w["tok_emb.weight"][self.ids]
        if self.cfg.bigram_vocab_size:
            x = x + self.bigram()
        for number, order in enumerate(self.cfg.hash_orders):
            rows = context_rows(self.ids.tolist(), order, self.cfg.hash_rows)
            x = x + self.hashed(f"hashes.{number}", rows)
        if self.cfg.induction_orders:
            x = x + self.induced()
        if self.cfg.smear_gate_enabled:
            x = x + self.smeared_by_input(x)
        x = rms_norm(x)
        if self.cfg.smear:
            starts = self.ids == self.cfg.bos_id
            x = smeared(x, sigmoid(self.w["smear.gate"]), starts & self.cfg.smear_bos_mask)
        return x

    def smeared_by_input(self, x):
        out = np.zeros_like(x)
        for t in range(1, len(x)):
            if self.cfg.smear_bos_mask and self.ids[t] == self.cfg.bos_id:
                continue
            gate = sigmoid(self.w["smear_gate.weight"][0] @ x[t, : self.cfg.gate_window])
            out[t] = self.w["smear_lambda"] * gate * x[t - 1]
        return out

    def bigram(self):
        return self.hashed("bigram", bigram_rows(self.ids, self.cfg.bigram_vocab_size))

    def hashed(self, name, rows):
        table = self.w[f"{name}.embed.weight"][rows]
        return table @ self.w[f"{name}.proj.weight"].T * self.w[f"{name}.scale"]

    def induced(self):
        out = np.zeros((len(self.ids), self.cfg.model_dim))
        found = followers(self.ids, self.cfg.induction_orders, self.cfg.bos_id, len(self.ids))
        for t, (token, number) in enumerate(found):
            if token is not None:
                gate = self.w["induction.gate"][number]
                out[t] = gate * self.w["tok_emb.weight"][token]
        return out

    def value_embedding(self, i):
        table = self.w["ve_shared.embed.weight"][self.ids]
        shared = table @ self.w["ve_shared.proj.weight"].T * self.w["ve_shared.scale"]
        return shared * self.w[f"ve_layer_scales.{self.cfg.ve_layers.index(i)}"]

    def of_block(self, i, name):
        return self.w[f"blocks.{i}.{name}"]

    def block(self, i, x, start):
        mixing = self.of_block(i, "resid_mix")
        x = mixing[0] * x + mixing[1] * start
        damping = 1 / math.sqrt(i + 1) if self.cfg.ln_scale else 1
        attended = self.attend(i, rms_norm(x) * damping)
        x = x + self.of_block(i, "attn_scale") * attended
        widened = self.mlp(i, rms_norm(x) * damping)
        return x + self.of_block(i, "mlp_scale") * widened

    def heads(self, x):
        return x.reshape(len(x), -1, self.cfg.head_dim)

    def attend(self, i, x):
        q = self.heads(x @ self.of_block(i, "attn.c_q.weight").T)
        k = self.heads(x @ self.of_block(i, "attn.c_k.weight").T)
        v = x @ self.of_block(i, "attn.c_v.weight").T
        if i in self.cfg.ve_layers:
            v = v + self.value_embedding(i)
        v = self.heads(v)
        gain = self.of_block(i, "attn.q_gain")[:, None]
        y = attention(self.turned(rms_norm(q)) * gain, self.turned(rms_norm(k)), v, self.starts)
        if i >= self.cfg.num_layers - self.cfg.xsa_last_n:
            y = without_own_value(y, v)
        if self.cfg.sparse_attn_gate_enabled:
            scores = x[:, : self.cfg.gate_window] @ self.of_block(i, "attn.attn_gate_w").T  # [T, H]
            y = y * sigmoid(self.cfg.sparse_attn_gate_scale * scores)[..., None]
        return y.reshape(len(x), -1) @ self.of_block(i, "attn.proj.weight").T

    def turned(self, y):
        """Rotary positions. y [T, H, D]"""
        dims = self.cfg.rope_dims or self.cfg.head_dim
        angles = rotary_angles(len(y), dims, self.cfg.rope_base)[:, None]
        a = y[..., : dims // 2]
        b = y[..., dims // 2 : dims]
        first = a * np.cos(angles) + b * np.sin(angles)
        second = b * np.cos(angles) - a * np.sin(angles)
        return np.concatenate((first, second, y[..., dims:]), -1)

    def mlp(self, i, x):
        h = x @ self.of_block(i, "mlp.fc.weight").T
        h = np.where(h > 0, h, self.cfg.leaky_slope * h)
        return h**2 @ self.of_block(i, "mlp.proj.weight").T


# --- optimizer and quantizers ---------------------------------------------------------------------


def quintic(s):
    """What one Newton-Schulz step does to singular values."""
    return 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5


def ema(values, decay):
    """The first value, then each new one with weight 1 - decay, as one sum."""
    last = len(values) - 1
    total = decay**last * values[0]
    for i in range(1, len(values)):
        weight = (1 - decay) * decay ** (last - i)
        total = total + weight * values[i]
    return total


def rounded(w, scale, top):
    """Codes of weights: nearest levels, clipped."""
    return np.clip(np.round(w / scale), -top, top)


def best_clip_error(w, top, tries=16):
    """Least squared error of one row over scales from its largest weight down to 40 % of it."""
    errors = []
    for step in range(tries):
        largest = np.abs(w).max() * (1 - 0.6 * step / tries)
        scale = np.float32(np.float16(largest / top))
        wrong = rounded(w, scale, top) * scale - w
        errors.append((wrong**2).sum())
    return min(errors)


def gptq(w, scale, hessian, top, damp):
    """Round one column, let those not yet rounded make up for it, take it out of the system.

    In float64. scale: [R], or of every entry [R, C].
    """
    w = w.astype(np.float64)
    h = hessian.astype(np.float64)
    for j in np.flatnonzero(np.diagonal(h) == 0):
        h[j, j] = 1
        w[:, j] = 0
    left = sorted(range(len(h)), key=lambda j: -h[j, j])
    damping = damp * np.diagonal(h).mean()
    inverse = np.linalg.inv(h + damping * np.eye(len(h)))
    codes = np.zeros_like(w)
    while left:
        j = left.pop(0)
        step = scale if scale.ndim == 1 else scale[:, j]
        codes[:, j] = rounded(w[:, j], step, top)
        error = (w[:, j] - codes[:, j] * step) / inverse[j, j]
        for k in left:
            w[:, k] -= error * inverse[j, k]
        taken_out = np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse = inverse - taken_out
    return codes


def quantization_penalty(matrices, tops, strength):
    """strength / 12 times the sum over matrices of mean(w^2 step^2) -> value, gradients by name.

    The steps are constants.
    """
    value = 0.0
    gradients = {}
    for name, w in matrices.items():
        gradients[name] = np.zeros_like(w)
        for i, j in np.ndindex(*w.shape):
            step = abs(w[i]).max() / tops[name]
            value += strength / 12 * (w[i, j] * step) ** 2 / w.size
            gradients[name][i, j] = strength / 6 * w[i, j] * step**2 / w.size
    return value, gradients


# --- exact counts and what is made of them --------------------------------------------------------


def counts_by_dictionary(tokens, orders, bos=None, hints="last"):
    """Order -> n, N, T, the token that followed last (most; the first that did) and its n [5, len].

    By a dictionary, token after token.
    """
    found = {k: np.zeros((5, len(tokens)), int) for k in orders}
    tables = defaultdict(Counter)
    last = {}
    for t, k in itertools.product(range(len(tokens)), orders):
        past = tokens[t - k + 1 : t] if t >= k - 1 else None
        if past is None or bos in past[1:]:
            continue
        context = (k, *past)
        seen = tables[context]
        hint = last.get(context, 0)
        distinct = sum(v > 0 for v in seen.values())
        agree = seen[hint] if context in last else 0
        found[k][:, t] = seen[tokens[t]], sum(seen.values()), distinct, hint, agree
        seen[tokens[t]] += 1
        if hints == "last" or agree == 0 or seen[tokens[t]] > agree:
            last[context] = tokens[t]
    return found


def counts_at_one_position(tokens, t, order):
    """n, N, T at one position, by comparing every earlier context with its own."""
    same = np.arange(t) >= order - 1
    for i in range(1, min(order, t + 1)):
        same[i:] &= tokens[: t - i] == tokens[t - i]
    followers = tokens[:t][same] if t >= order - 1 else tokens[:0]
    return (followers == tokens[t]).sum(), len(followers), len(np.unique(followers))


def discounted(n, total, distinct, lower, discount, concentration):
    """Interpolated absolute discounting over the next lower order's q; a new context keeps it."""
    if not total:
        return lower
    freed = (concentration + discount * distinct) * lower
    return (max(n - discount, 0) + freed) / (total + concentration)


def longest_context(counts, orders, t):
    """Rank (0: none) of the longest context that was seen before, and its five counts."""
    for rank in range(len(orders), 0, -1):
        found = counts[orders[rank - 1]][:, t]
        if found[1]:
            return rank, [int(value) for value in found]
    return 0, [0, 1, 0, 0, 0]


def logit(p):
    return math.log(p / (1 - p))


def tilt_bucket(rank, total, agree, h):
    """Which statistics a hint shares: length of context, its count, agreement, network's belief."""
    count = min(int(math.log2(total)), 5)
    share = min(4 * agree // total, 3)
    belief = 4 + math.floor(logit(h) / 1.5)
    return rank, count, share, min(max(belief, 0), 7)


def tilted_charges(p, tokens, orders, bos, chunk):
    """Nats of every target, and how many hints were raised.

    b such that the hint has its bucket's share of hits; never lowered. Counted chunk by chunk.
    """
    counts = counts_by_dictionary(tokens, orders, bos)
    seen = defaultdict(lambda: (0, 2))
    fresh = defaultdict(lambda: (0, 0))
    nats = []
    raised = 0
    for j, target in enumerate(tokens[1:].tolist()):
        if j % chunk == 0:
            for bucket, (hits, trials) in fresh.items():
                seen[bucket] = seen[bucket][0] + hits, seen[bucket][1] + trials
            fresh.clear()
        rank, (_, total, _, hint, agree) = longest_context(counts, orders, j + 1)
        charged = p[j, target]
        if rank:
            h = p[j, hint]
            bucket = tilt_bucket(rank, total, agree, h)
            hits, trials = seen[bucket]
            boost = max(logit(hits / trials) - logit(h), 0) if hits else 0
            raised += boost > 0
            hit = target == hint
            charged *= math.exp(boost * hit) / (1 + h * (math.exp(boost) - 1))
            fresh[bucket] = fresh[bucket][0] + hit, fresh[bucket][1] + 1
        nats.append(-math.log(charged))
    return nats, raised


def mixed_charges(p, tokens, orders, bos, chunk):
    """Nats of every target by network and exact counts.

    Weights are the experts' mean responsibilities in the bucket, with a prior. Counted chunk by
    chunk.
    """
    vocab = p.shape[1]
    counts = counts_by_dictionary(tokens, orders, bos)
    doubt = -(p * np.log(p)).sum(1) / math.log(vocab)
    prior = np.array([9.0, *[1 / 9] * 9])
    seen = {}
    fresh = {}
    nats = []
    for j, target in enumerate(tokens[1:]):
        if j % chunk == 0:
            for bucket, shares in fresh.items():
                seen[bucket] = seen.get(bucket, prior) + shares
            fresh = {}
        experts = [p[j, target]]
        q = 1 / vocab
        for order in orders:
            n, total, distinct = counts[order][:3, j + 1]
            q = discounted(n, total, distinct, q, 0.75, 0.5)
            experts.append(q)
        rank, (_, total, *_) = longest_context(counts, orders, j + 1)
        bucket = rank, min(int(math.log2(total)), 4), min(int(4 * doubt[j]), 3)
        weights = seen.get(bucket, prior)
        parts = weights / weights.sum() * np.array(experts)
        nats.append(-math.log(parts.sum()))
        fresh[bucket] = fresh.get(bucket, 0) + parts / parts.sum()
    return nats


# --- hashed caches --------------------------------------------------------------------------------


def counts_of_earlier_groups(keys, groups, counted):
    """How often each key was counted in groups before its own."""
    table = Counter()
    waiting = []
    found = []
    for i, key in enumerate(keys.tolist()):
        if i and groups[i] != groups[i - 1]:
            table.update(waiting)
            waiting = []
        found.append(table[key])
        if counted is None or counted[i]:
            waiting.append(key)
    return found


class HashedTables:
    """Counters of contexts, and of contexts with the token after them, for several orders."""

    def __init__(self, orders, primes, buckets):
        self.orders = orders
        self.primes = primes
        self.buckets = buckets
        self.contexts = {order: Counter() for order in orders}
        self.fulls = {order: Counter() for order in orders}

    def slots(self, context, target):
        """Slot of a context, oldest token first, and of context and target."""
        key = 0
        for k, token in enumerate(context):
            key ^= int(token) * self.primes[k % len(self.primes)]
        full = key ^ int(target) * self.primes[len(context) % len(self.primes)]
        return key % self.buckets, full % self.buckets

    def add(self, context, target):
        order = len(context) + 1
        slot, full = self.slots(context, target)
        self.contexts[order][slot] += 1
        self.fulls[order][full] += 1

    def ratio(self, context, target, min_count):
        """Count of both over count of the context, at most 1; -1 where too little was counted."""
        order = len(context) + 1
        slot, full = self.slots(context, target)
        count = self.contexts[order][slot]
        if count < min_count:
            return -1.0
        return min(self.fulls[order][full], count) / count


class Window(NamedTuple):
    start: int
    first: int  # target
    end: int  # after the last target


def windows_of(n, seq_len, stride):
    windows = []
    start = first = 0
    while first < n:
        windows.append(Window(start, first, min(start + seq_len, n)))
        first = windows[-1].end
        start += stride
    return windows


def chunks_of_windows(n, seq_len, stride, chunk):
    """The windows in lists: one a chunk of targets, by first scored target; chunk 0: each alone."""
    windows = windows_of(n, seq_len, stride)
    if not chunk:
        return [[window] for window in windows]
    return [list(w) for _, w in itertools.groupby(windows, lambda w: w.first // chunk)]


def hashed_ratios(tokens, seq_len, stride, cfg, vocab=None):
    """Token by token, window after window.

    [n, 1, K] for the true targets or [n, V, K] for every possible one.
    """
    n = len(tokens) - 1
    orders = range(cfg.ngram_min_order, cfg.ngram_order + 1)
    tables = HashedTables(orders, PRIMES[cfg.ngram], cfg.ngram_buckets)
    out = np.full((n, vocab or 1, len(orders)), -1.0)
    for windows in chunks_of_windows(n, seq_len, stride, cfg.ngram_chunk_tokens):
        to_add = []
        for window in windows:
            for at in range(window.first + 1, window.end + 1):  # of the target in the stream
                asked = range(vocab) if vocab else [tokens[at]]
                to_add += _ask(tables, tokens, at, windows[0].first, window, cfg, asked, out)
        for context, target in to_add:
            tables.add(context, target)
    return out


def _ask(tables, tokens, at, piece, window, cfg, asked, out):
    """Writes the ratios of one target -> its n-grams that are counted after the chunk.

    Gated caches count n-grams of the piece only, and ask about those of the window only; the others
    take the highest order that counts.
    """
    gated = cfg.ngram == "gated"
    joining = []
    for order in reversed(tables.orders):
        begin = at - order + 1
        if begin < 0:
            continue
        context = tokens[begin:at]
        if not gated or begin >= piece:
            joining.append((context, tokens[at]))
        if gated and begin <= window.start:
            continue
        ratios = [tables.ratio(context, token, cfg.ngram_min_count) for token in asked]
        if ratios[0] >= 0:
            out[at - 1, :, order - tables.orders[0]] = ratios
            if not gated:
                break
    return joining


# --- charges --------------------------------------------------------------------------------------


def charges_one_by_one(model, tokens, seq_len, stride):
    """Each target alone, from the definition.

    A window begins at a multiple of the stride and holds the target.
    """
    nats = []
    for j in range(len(tokens) - 1):
        start = 0
        while start + seq_len <= j:
            start += stride
        ids = torch.from_numpy(tokens[start : j + 1].astype(np.int64))
        log_p = model.logits(ids[None])[0, -1].double().log_softmax(-1)
        nats.append(-log_p[int(tokens[j + 1])].item())
    return np.array(nats)


def temper(logits, temperature):
    """One row of logits, divided by the clamped, entropy-scaled temperature."""
    p = softmax(logits)
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    doubt = entropy / math.log(len(p))
    divisor = 1 - (1 - temperature) * (1 - doubt)
    return logits / min(max(divisor, 0.9), 1.05)


@torch.no_grad()
def outputs_of_windows(model, tokens, windows, temperature=1.0):
    """log p of every target's position [n, V] and the stream there [n, D], window after window."""
    log_p = []
    hidden = []
    for window in windows:
        ids = torch.from_numpy(tokens[window.start : window.end].astype(np.int64))
        stream = model.hidden(ids[None])[0, window.first - window.start :]
        logits = model.head(stream).double().numpy()
        log_p += [log_softmax(temper(row, temperature)) for row in logits]
        hidden.append(stream.double().numpy())
    return np.array(log_p), np.concatenate(hidden)


def mixture(gate, p, ratios, floor):
    """One target: softmax over network and orders that count, the network lifted to the floor."""
    masked = [g if ratio >= 0 else -math.inf for g, ratio in zip(gate[1:], ratios)]
    weights = (1 - floor) * softmax(np.array([gate[0], *masked]))
    weights[0] += floor
    assert abs(sum(weights) - 1) < 1e-12
    return sum(w * e for w, e in zip(weights, [p, *ratios]))


def cache_weight(cfg, log_p):
    """What a fixed or backoff cache weighs against the network."""
    if cfg.ngram == "fixed":
        return cfg.ngram_alpha
    entropy = -sum(math.exp(x) * x for x in log_p)
    return cfg.ngram_ent_base + cfg.ngram_ent_range * sigmoid(2 * (entropy - 4))


def cache_charges(model, tokens, cfg, log_p, hidden):
    """Charges of a hashed cache over the network's outputs, one target at a time.

    With the weights of fixed and of backoff.
    """
    stride = cfg.ngram_stride or cfg.eval_stride
    ratios = hashed_ratios(tokens, cfg.train_seq_len, stride, cfg)[:, 0]
    if cfg.ngram == "gated":
        weight = model.alpha_head.weight.detach().double().numpy()
        gates = hidden @ weight.T + model.alpha_head.bias.detach().double().numpy()
    nats = []
    alphas = []
    for j, target in enumerate(tokens[1:]):
        p = math.exp(log_p[j, target])
        found = [ratio for ratio in ratios[j] if ratio >= 0]
        if cfg.ngram == "gated":
            p = mixture(gates[j], p, ratios[j], 0.05)
        elif found:
            alphas.append(cache_weight(cfg, log_p[j]))
            p = (1 - alphas[-1]) * p + alphas[-1] * found[0]
        nats.append(-math.log(min(max(p, 1e-12), 1)))
    return np.array(nats), np.array(alphas)
