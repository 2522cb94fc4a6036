"""Heuristic checks S1 to S4 report planted faults and leave the legal script next to it alone."""

import ast

import pytest
from checking import assert_found, check, program, word
from tool import heuristics, script
from tool.finding import text_of

# S1: five epochs over all validation tokens inline in main() before the score, the shape that a
# reviewer overlooked
EPOCHS_IN_MAIN = """
    val_loss, val_bpb = eval_val(args, model, val_tokens)
    if args.ttt_epochs > 0:
        tuner = torch.optim.AdamW(model.parameters(), lr=args.ttt_lr)
        for epoch in range(args.ttt_epochs):
            total = 0.0
            for at in range(0, val_tokens.numel() - 1, args.seq_len):
                piece = val_tokens[at:at + args.seq_len + 1].to(torch.int64)
                x, y = piece[:-1], piece[1:]
                tuner.zero_grad()
                loss = model(x, y)
                loss.backward()
                tuner.step()
                total += loss.item()
    val_loss, val_bpb = eval_val(args, model, val_tokens)
"""
ADAPT = """
def adapt(model, tokens, epochs, opt):
    for _ in range(epochs):
        opt.zero_grad()
        loss = model(tokens[:-1], tokens[1:])
        loss.backward()
        opt.step()
"""
QUIET = """
@torch.inference_mode()
def score_chunk(model, tokens):
    return model(tokens[:-1], tokens[1:])
"""
DISCARDED_SCORE = """
    for epoch in range(args.epochs):
        for at in range(0, len(val_tokens), 64):
            piece = val_tokens[at:at + 65]
            with torch.no_grad():
                total += model(piece[:-1], piece[1:])
            loss = model(piece[:-1], piece[1:])
            loss.backward()
            opt.step()
"""
SCORE_FIRST = """
    total, count = 0.0, args.chunks
    for index in range(count):
        piece = val_tokens[index * 64:index * 64 + 65]
        with torch.inference_mode():
            for part in piece.split(8):
                nll = F.cross_entropy(model(part[:-1]), part[1:])
                total += nll.sum()
        if index + 1 < count:
            for epoch in range(args.ttt_epochs):
                for part in piece.split(8):
                    loss = model(part[:-1], part[1:])
                    loss.backward()
                    opt.step()
"""
ONE_FORWARD = """
    for piece in val_tokens.split(64):
        nll = model(piece[:-1], piece[1:])
        with torch.no_grad():
            total += nll.double().sum()
        nll.mean().backward()
        opt.step()
"""
HARNESS = """
class Predictor:
    @torch.inference_mode()
    def score(self, batch):
        return F.cross_entropy(self.model(batch.ids), batch.targets)

    def observe(self, tokens):
        for _ in range(3):
            loss = self.model(tokens[:-1], tokens[1:])
            loss.backward()
            self.opt.step()

def charge(score, nats):
    score.total += nats.sum()

def evaluate(predictor, tokens, score):
    for lo, hi in chunks(tokens):
        for batch in batches(tokens, lo, hi):
            nats = predictor.score(batch)
            charge(score, nats)
        predictor.observe(tokens[lo:hi + 1])
"""
IN_CALLER = """
total = 0.0
for piece in val_tokens.split(64):
    total += score_chunk(model, piece)
    adapt(model, piece, 3, opt)
"""
ADAPT_FIRST = """
for piece in val_tokens.split(64):
    adapt(model, piece, 3, opt)
    total += score_chunk(model, piece)
"""
ADAPT_ALL = """
adapt(model, val_tokens, 5, opt)
eval_val(args, model, val_tokens)
"""
TRAINS_FIRST = {
    "inline": (program(EPOCHS_IN_MAIN), "main trains"),
    "function": (program(ADAPT_ALL, ADAPT), "adapt trains"),
    "adapt_then_score": (program(ADAPT_FIRST, ADAPT + QUIET), "adapt trains"),
    "every_epoch": (program(DISCARDED_SCORE), "main trains"),
}
SCORES_FIRST = {
    "no_ttt": program("eval_val(args, model, val_tokens)"),
    "score_first": program(SCORE_FIRST),
    "in_caller": program(IN_CALLER, ADAPT + QUIET),
    "harness": program("evaluate(Predictor(), val_tokens, score)", HARNESS),
    "never_called": program("eval_val(val_tokens)", ADAPT),
    "one_forward": program(ONE_FORWARD),
}


@pytest.mark.parametrize("name", TRAINS_FIRST)
def test_training_before_the_score(name):
    text, where = TRAINS_FIRST[name]
    finding = check("S1", text)
    assert finding.word == "WARN"
    told = text_of(finding)
    assert where in told
    assert "scored before" in told
    assert told.count("trains on") == 1  # the training loop proper is not meant


@pytest.mark.parametrize("name", SCORES_FIRST)
def test_score_first_is_legal(name):
    assert word("S1", SCORES_FIRST[name]) == "PASS"


def test_what_the_run_switched_off_is_left_out():
    setting = 'import os\nEPOCHS = int(os.environ.get("TTT_EPOCHS", 5))\n'
    text = setting + program(EPOCHS_IN_MAIN)
    off = {"TTT_EPOCHS": "0"}
    assert word("S1", text, run_settings=off) == "PASS"
    assert word("S1", text, run_settings={"SEED": "1"}) == "WARN"
    # What ran is not known.
    assert word("S1", text, config=off) == "WARN"


# S2: hashed n-gram cache with the target in the key, as in the caches that were closed
CACHE = """
import numpy as np
def eval_ngram(tokens, where, primes, mask, table, full, p):
    key = np.zeros(len(where), dtype=np.uint64)
    for k in range(4):
        key ^= tokens[where - (4 - k)] * primes[k]
    tgt = tokens[where]
    pair = ((key ^ (tgt * primes[4])) & mask).astype(np.int64)
    seen = table[key & mask]
    LOOKUP
    np.add.at(table, key & mask, 1)
    np.add.at(full, pair, 1)
    return p
eval_ngram(*arguments())
"""
ORACLE = """
def look_up(table, slots):
    return table.index_select(0, slots)
class Oracle:
    def probability(self, x, y):
        both = (x * 36313 + y * 27191) % 1048576
        return look_up(self.full, both)
Oracle().probability(x, y)
"""
MODEL = """
class Bigram(nn.Module):
    def rows(self, tokens):
        t = tokens.int()
        out = torch.empty_like(t)
        out[..., 1:] = torch.bitwise_xor(36313 * t[..., 1:], 27191 * t[..., :-1]) % 4095
        return out
    def forward(self, ids, targets=None):
        logits = self.head(self.table[self.rows(ids)])
        picked = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1))
        return F.cross_entropy(logits, targets) + picked[targets > 0].sum()
"""


def cache(line):
    return CACHE.replace("LOOKUP", line)


@pytest.mark.parametrize("text", [cache("p = full[pair] / seen"), ORACLE], ids=["cache", "oracle"])
def test_target_in_the_key(text):
    assert_found("S2", text, "WARN", "hash that contains the target")


def test_target_in_the_key_of_code_that_nothing_calls():
    read = cache("p[full[pair] > 0] = 1")
    assert word("S2", read) == "WARN"
    uncalled = read.replace("eval_ngram(*arguments())", "")
    assert word("S2", uncalled) == "PASS"


def test_context_keys_updates_and_final_charges_are_legal():
    update = cache("full[pair] = full[pair] + 1")
    assert word("S2", update) == "PASS"
    charge = cache("p = seen.full_distribution()[tgt]")
    assert word("S2", charge) == "PASS"
    assert word("S2", MODEL + "\nloss = Bigram()(x, y)") == "PASS"


SLOT = """
def eval_slot(model, val_tokens):
    for window in windows(val_tokens):
        hidden = model.hidden(window)
        delta = MADE
        for _ in range(8):
            loss = model.nll(hidden + delta, window)
            loss.backward()
        total += model.nll(hidden + delta.detach(), window)
eval_slot(model, val_tokens)
"""
MADE = "torch.zeros(512, requires_grad=True)"
OWN = """for p in model.parameters():
            p.requires_grad_(True)
        hidden = """


@pytest.mark.parametrize(
    "made", [MADE, "torch.zeros(512).requires_grad_()", "torch.nn.Parameter(torch.zeros(512))"]
)
def test_optimised_on_the_scored_window(made):
    finding = check("S3", SLOT.replace("MADE", made))
    assert finding.word == "WARN"
    told = text_of(finding)
    assert "trainable tensor" in told
    assert "eval_slot" in told


def test_training_the_models_own_parameters_is_no_slot():
    legal = SLOT.replace("MADE", "torch.zeros(512)")
    legal = legal.replace("hidden = ", OWN)
    assert word("S3", legal) == "PASS"
    training = SLOT.replace("MADE", MADE)
    training = training.replace("eval_slot", "pretrain")
    training = training.replace("val_tokens", "tokens")
    assert word("S3", training) == "PASS"


@pytest.mark.parametrize(
    "line",
    [
        "nll = torch.minimum(nll_model, nll_cache)",
        "nll = np.minimum(model.nll, cache_nll)",
        "val_bpb = min(plain_bpb, ngram_bpb)",
        "nll = torch.stack([nll_a, nll_b]).amin(0)",
        "which = torch.stack([loss_a, loss_b]).argmin(0)",
        "nll = torch.where(nll_a < nll_b, nll_a, nll_b)",
        "nll = nll_a if nll_a < nll_b else nll_b",
    ],
)
def test_lower_of_two_scores(line):
    assert_found("S4", program(line), "WARN", "picks the lower of")


@pytest.mark.parametrize(
    "line",
    [
        "best_loss = min(best_loss, val_loss)",
        "rows = min(len(losses), len(score.nats))",
        "nll = min(nll, 20.0)",
        "p = torch.where(seen > 0, p_mixed, p_model)",
        "counts = np.minimum(full_counts, context_counts)",
    ],
)
def test_other_minima(line):
    assert word("S4", program(line)) == "PASS"


CHOICES = """
def peek(x, targets): return x[targets ^ 31]
def used(x): return x
def wanted(cfg): return cfg.peeking != ""
def build(x: peek, t): return peek(x, t)
ROWS = [Row("a", wanted, build)]
TABLE = {"a": (lambda cfg: cfg.peeking, lambda x, t: peek(x, t))}
part = peek if cfg.peeking else used
"""


@pytest.mark.parametrize("value, live", [("", False), ("1", True)])
def test_parts_that_settings_do_not_choose_are_not_live(value, live):
    parsed = script.Script(CHOICES, run_settings={"PEEKING": value})
    hashed = next(node for node in parsed.nodes if isinstance(node, ast.BinOp))
    assert heuristics.Liveness(parsed).live(hashed) is live


UNUSED = """
def main(): used()
def used(): return 1
def left(): return right()
def right(): return left()
def alone(): return alone() + below()
def below(): return last()
def last(): return 2
"""


def test_functions_that_only_unused_ones_mention_are_not_live():
    """Two that call each other count as used: nothing tells which of them would be the start."""
    parsed = script.Script(UNUSED)
    liveness = heuristics.Liveness(parsed)
    live = [function.name for function in parsed.tree.body if liveness.live(function)]
    assert live == ["main", "used", "left", "right"]


REACHED = {
    "loop": "for i in n:\n    use(kept)\n    kept = marked",
    "other_branch": "if a:\n    kept = 0\nelse:\n    kept = marked\nuse(kept)",
    "pairs": "other, kept = 0, marked\nuse(kept)",
    "table": "kept[i] = marked\nuse(kept)",
    "method": (
        "class A:\n    def run(self, kept):\n        use(kept)\ndef main():\n    A().run(marked)\n"
        "main()"
    ),
    "attribute": (
        "class A:\n    def keep(self):\n        self.kept = marked\n    def run(self):\n"
        "        kept = self.kept\n        use(kept)\na = A()\na.keep()\na.run()"
    ),
    "addition": "kept = 0\nkept += marked\nuse(kept)",
}
NOT_REACHED = {
    "overwritten": "kept = marked\nkept = 0\nuse(kept)",
    "pairs": "kept, other = 0, marked\nuse(kept)",
    "shape": "kept = marked.shape\nuse(kept)",
    "parameter": "f = lambda kept: use(kept)\nkept = marked\nf(0)",
    "second_parameter": (
        "class A:\n    def run(self, other, kept):\n        use(kept)\nA().run(marked, 0)"
    ),
}


def used_value_is_marked(text):
    parsed = script.Script(text)
    flow = heuristics.Flow(heuristics.Liveness(parsed), is_marked)
    use = next(call for call in parsed.calls if ast.unparse(call) == "use(kept)")
    return flow.has(use.args[0])


def is_marked(node):
    return isinstance(node, ast.Name) and node.id == "marked"


@pytest.mark.parametrize("name", REACHED)
def test_marks_follow_assignments(name):
    assert used_value_is_marked(REACHED[name])


@pytest.mark.parametrize("name", NOT_REACHED)
def test_marks_end_where_something_else_is_assigned(name):
    assert not used_value_is_marked(NOT_REACHED[name])
