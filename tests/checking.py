"""Runs static checks on small scripts, for the tests of each kind of check."""

import textwrap

from record_help import expect
from tool import static

PROGRAM = """
import torch, os
import torch.nn.functional as F
{helpers}
def main():
    args, model, opt, stream = setup()
    val_tokens = load_validation_tokens(args.val_files, args.seq_len)
    for step in range(args.iterations):
        if step % args.val_loss_every == 0:
            val_loss, val_bpb = eval_val(args, model, val_tokens)
        x, y = stream.next_batch()
        loss = model(x, y)
        loss.backward()
        opt.step()
{body}

if __name__ == "__main__":
    main()
"""


def program(body, helpers=""):
    """A script whose main() trains legally on the training stream, then runs body on val_tokens."""
    inside = textwrap.dedent(body).strip("\n")
    inside = textwrap.indent(inside, " " * 4)
    return PROGRAM.format(helpers=textwrap.dedent(helpers), body=inside)


def check(name, script, **options):
    """What one check finds; all of them are made, in order."""
    findings = static.static_checks(textwrap.dedent(script), **options)
    by_name = {finding.name: finding for finding in findings}
    assert list(by_name) == list(static.CHECKS)
    return by_name[name]


def word(name, script, **options):
    """Its verdict."""
    return check(name, script, **options).word


def assert_found(name, script, verdict, words, **options):
    """The check comes to a verdict and says why."""
    expect(check(name, script, **options), verdict, words)
