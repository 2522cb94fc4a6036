"""Slow restatements of scoring that learns: test-time training and adapters, one row at a time.

Nothing here imports the script either; oracles.py has the rest.
"""

import copy
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from oracles import chunks_of_windows, outputs_of_windows

# --- which rows a step learns from ----------------------------------------------------------------


def steps_after_a_chunk(count, cfg):
    """PR 834: the first tokens of the rows, [steps][parts][rows].

    Each part is a run of neighbouring rows; of 5 in two parts the first has 2, the second 3.
    """
    length = cfg.train_seq_len
    rows = count // length
    whole = rows // cfg.ttt_parts
    one_more = cfg.ttt_parts - rows % cfg.ttt_parts  # from this part on
    sizes = [whole + (part >= one_more) for part in range(cfg.ttt_parts)]
    steps = []
    for at in range(0, max(sizes), cfg.ttt_batch_seqs):
        step = []
        for part, share in enumerate(sizes):
            first = sum(sizes[:part])
            here = range(at, min(at + cfg.ttt_batch_seqs, share))
            step.append([(first + row) * length for row in here])
        steps.append([starts for starts in step if starts])
    return steps


def steps_before_scoring(count, cfg):
    """PR 489: parts are cut at tokens, a batch begins only while more than a row is left."""
    length = cfg.train_seq_len
    step = cfg.ttt_batch_seqs * length
    share = count // length * length // cfg.ttt_parts
    parts = []
    for part in range(cfg.ttt_parts):
        end = (part + 1) * share
        batches = []
        for start in range(part * share, end - length, step):
            rows = (min(start + step, end) - start) // length
            batches.append([start + row * length for row in range(rows)])
        parts.append(batches)
    return list(zip(*parts))


# --- test-time training of a network's own parameters ---------------------------------------------


def bytes_of(table, before, token):
    """What a token is charged for after another one."""
    mark = table.marked[token] and not table.boundary[before]
    return float(table.sizes[token] + int(mark))


def gradient_of_rows(model, params, tokens, starts, cfg, table):
    """Gradient of the mean nats of some rows, weighted by bytes or not."""
    nats = []
    weights = []
    for start in starts:
        span = tokens[start : start + cfg.train_seq_len + 1].astype(np.int64)
        logits = model.logits(torch.from_numpy(span[None, :-1]))[0]
        log_p = torch.log_softmax(logits, -1)
        for t, (before, token) in enumerate(itertools.pairwise(span)):
            nats.append(-log_p[t, token])
            weights.append(bytes_of(table, before, token) if cfg.byte_weighted_ttt else 1.0)
    total = sum(w * x for w, x in zip(weights, nats))
    found = torch.autograd.grad(total / sum(weights), params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found)]


def cosine(rate, number, count):
    """The rate after a chunk: falls to zero at the last."""
    return rate * 0.5 * (1 + math.cos(math.pi * number / (count - 1)))


class Adaptation:
    """SGD with momentum 0.9 or Adam without decay, on a copy of the model, by hand.

    Gradients are clipped to norm 1.
    """

    def __init__(self, model, cfg, names, table):
        self.model = copy.deepcopy(model)
        self.cfg = cfg
        self.table = table
        self.steps = 0
        self.norms = []
        self.params = [p for name, p in self.model.named_parameters() if name in names]
        self.first = [torch.zeros_like(p) for p in self.params]
        self.second = [torch.zeros_like(p) for p in self.params]

    def learn(self, tokens, rate, steps_of=steps_after_a_chunk):
        limit = math.inf if self.cfg.ttt_before_scoring else 1.0
        for parts in steps_of(len(tokens) - 1, self.cfg) * self.cfg.ttt_epochs:
            several = [self.gradient(tokens, starts) for starts in parts]
            mean = [sum(gradients) / len(parts) for gradients in zip(*several)]
            squares = [g.double().square().sum().item() for g in mean]
            self.norms.append(math.sqrt(sum(squares)))
            shrink = min(1, limit / self.norms[-1])
            self.step([g * shrink for g in mean], rate)

    def gradient(self, tokens, starts):
        return gradient_of_rows(self.model, self.params, tokens, starts, self.cfg, self.table)

    @torch.no_grad()
    def step(self, gradients, rate):
        self.steps += 1
        for p, g, first, second in zip(self.params, gradients, self.first, self.second):
            if self.cfg.ttt_optimizer == "sgd":
                first.mul_(0.9).add_(g)
                p -= rate * first
            else:
                first.mul_(0.9).add_(0.1 * g)
                second.mul_(0.999).add_(0.001 * g * g)
                mean = first / (1 - 0.9**self.steps)
                size = (second / (1 - 0.999**self.steps)).sqrt()
                p -= rate * mean / (size + 1e-8)

    def outputs(self, tokens, windows):
        return outputs_of_windows(self.model, tokens, windows, self.cfg.ttt_temperature)

    def charge(self, tokens, windows):
        log_p, _ = self.outputs(tokens, windows)
        targets = tokens[windows[0].first + 1 :]
        return [-row[target] for row, target in zip(log_p, targets)]

    def over_chunks(self, tokens, scored):
        """scored(windows) of each chunk, which is then learned; the last one is only scored."""
        cfg = self.cfg
        chunks = chunks_of_windows(
            len(tokens) - 1, cfg.train_seq_len, cfg.eval_stride, cfg.ttt_chunk_tokens
        )
        found = []
        for number, windows in enumerate(chunks, 1):
            found.append(scored(windows))
            if number < len(chunks):
                piece = tokens[windows[0].first : windows[-1].end + 1]
                self.learn(piece, cosine(cfg.ttt_lr, number - 1, len(chunks)))
        return found


# --- adapters, each document alone ----------------------------------------------------------------


class Hidden(torch.nn.Module):
    """A module whose forward is the model's `hidden`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.hidden(ids)


class Adapters:
    """Two low-rank factors for every matrix: W + (alpha / rank) B A in place of W.

    With torch's AdamW, one step after each chunk but a document's last.
    """

    def __init__(self, model, names, lows, cfg):
        self.module = Hidden(model)
        self.head = model.head
        self.weights = {name: p.detach() for name, p in model.named_parameters()}
        self.names = names
        self.cfg = cfg
        self.lows = [low.clone().requires_grad_() for low in lows]
        self.highs = [self.new_high(name) for name in names]
        self.optimizer = torch.optim.AdamW(
            [*self.lows, *self.highs],
            lr=cfg.ttt_lr,
            betas=(0.0, 0.99),
            eps=1e-10,
            weight_decay=cfg.ttt_lora_wd,
        )

    def new_high(self, name):
        rows = len(self.weights[name])
        return torch.zeros(rows, self.cfg.ttt_lora_rank, requires_grad=True)

    def hidden(self, ids):
        scale = self.cfg.ttt_lora_alpha / self.cfg.ttt_lora_rank
        merged = dict(self.weights)
        for name, low, high in zip(self.names, self.lows, self.highs):
            merged[name] = self.weights[name] + scale * high @ low
        changed = {f"model.{name}": w for name, w in merged.items()}
        return torch.func.functional_call(self.module, changed, ids)

    def read(self, tokens):
        """Nats of every token of a document after its first."""
        nats = []
        while len(nats) < len(tokens) - 1:
            begin = len(nats)
            size = self.cfg.ttt_lora_chunk
            for early, until in reversed(self.cfg.early_chunks):
                if begin < until:
                    size = min(early, until - begin)
            end = min(begin + size, len(tokens) - 1)
            first = max(0, begin + size - self.cfg.train_seq_len)  # inputs up to the chunk's end
            ids = torch.from_numpy(tokens[first:end].astype(np.int64))
            targets = torch.from_numpy(tokens[begin + 1 : end + 1].astype(np.int64))
            logits = self.head(self.hidden(ids[None]))[0, begin - first :]
            losses = F.cross_entropy(logits, targets, reduction="none")
            nats += losses.tolist()
            if end < len(tokens) - 1:
                self.optimizer.zero_grad()
                losses.mean().backward()
                self.optimizer.step()
        return nats


def global_step(model, tokens, cfg):
    """One pass of SGD over a stream in packed rows, an eighth of a step each."""
    targets, size = len(tokens) - 1, cfg.ttt_chunk_tokens
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    count = -(-targets // size)
    for number in range(max(1, count - 1)):
        lo, hi = number * size, min(targets, (number + 1) * size)
        optimizer.zero_grad()
        piece = -(-size // 8)
        for begin in range(lo, hi, piece):
            row = tokens[begin : min(begin + piece, hi) + 1].astype(np.int64)
            starts, since = [], 0
            for place, token in enumerate(row[:-1]):
                since = 0 if token == cfg.bos_id else since
                if since % cfg.train_seq_len == 0:
                    starts.append(place)
                since += 1
            row = torch.from_numpy(row)
            loss = model(row[None, :-1], row[None, 1:], documents=torch.tensor(starts))
            (loss * (len(row) - 1) / (hi - lo)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = number / max(1, count - 1)
        for group in optimizer.param_groups:
            group["lr"] = cfg.ttt_global_lr * (1 + np.cos(np.pi * share)) / 2
        optimizer.step()
    model.requires_grad_(False)


def adapter_charges(model, names, start, tokens, cfg):
    """Nats of a stream, document by document; ttt_docs slots keep the lower factors in turn.

    start: of each matrix the lower factors of all slots.
    """
    kept = {slot: [low[slot].clone() for low in start] for slot in range(cfg.ttt_docs)}
    edges = [*np.flatnonzero(tokens[:-1] == cfg.bos_id), len(tokens) - 1]
    nats = []
    for document, (begin, end) in enumerate(itertools.pairwise(edges)):
        if document and document == cfg.ttt_global_docs:
            global_step(model, tokens[: begin + 1], cfg)
        slot = (document - cfg.ttt_global_docs * (document >= cfg.ttt_global_docs)) % cfg.ttt_docs
        adapters = Adapters(model, names, kept[slot], cfg)
        nats += adapters.read(tokens[begin : end + 1])
        if cfg.ttt_lora_keep:
            kept[slot] = [low.detach() for low in adapters.lows]
    return nats
