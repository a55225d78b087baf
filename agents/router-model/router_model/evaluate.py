"""The evaluation: how many requests from templates that training never saw go to the right agent."""

import json
import random
from dataclasses import dataclass, field

import numpy as np

from .data import KINDS, Generator
from .model import forward, logits
from .tokenizer import END

SEED = 20251  # decides which examples are made of the templates
EACH = {"clean": 4, "noisy": 4, "long": 1}  # examples from every template, by style
LONGEST_REPLY = 16
BEGIN, FINISH = "<!-- measured: begin -->", "<!-- measured: end -->"


class Router:
    """A model that answers."""

    def __init__(self, config, weights, tokenizer):
        self.config, self.weights, self.tokenizer = config, weights, tokenizer

    def run(self, tokens, past=None):
        """Scores of every token after these, and what later calls need of these."""
        states, past = forward(np, self.config, self.weights, np.array([tokens]), past)
        return logits(self.weights, states[0, -1]), past

    def reply(self, prompt):
        """The greedy reply, always the likeliest token; None when it does not end."""
        scores, past = self.run(prompt)
        said = []
        while len(said) < LONGEST_REPLY:
            token = int(np.argmax(scores))
            if token == END:
                return self.tokenizer.decode(said)
            said.append(token)
            scores, past = self.run([token], past)
        return None

    def ask(self, messages):
        """The greedy reply to a conversation."""
        return self.reply(self.tokenizer.prompt(messages))


def kind_of(reply):
    """The agent that a reply names, if it is JSON of the right form and nothing else."""
    try:
        value = json.loads(reply or "")
    except ValueError:
        return None
    named = value.get("agent") if isinstance(value, dict) and len(value) == 1 else None
    return named if named in KINDS else None


@dataclass
class Score:
    """What became of examples: by what was right, then by what the model said; no valid answer last."""

    confusion: list = field(default_factory=lambda: [[0] * (len(KINDS) + 1) for _ in KINDS])

    def count(self, right, said):
        """Counts one example."""
        column = KINDS.index(said) if said else len(KINDS)
        self.confusion[KINDS.index(right)][column] += 1

    @property
    def total(self):
        """Examples in all."""
        return sum(map(sum, self.confusion))

    @property
    def right(self):
        """Examples that went to the right agent."""
        return sum(self.confusion[i][i] for i in range(len(KINDS)))

    @property
    def valid(self):
        """Replies that were JSON of the right form, without a grammar to force them."""
        return self.total - sum(row[-1] for row in self.confusion)


def examples(split, style):
    """The examples of a split in one style: always the same."""
    return Generator(split).from_each_template(EACH[style], style, random.Random(SEED))


def score(router, split, style, wrong=None):
    """Asks the model every question of a split in one style; `wrong` is called with each that it got wrong."""
    out = Score()
    for example in examples(split, style):
        reply = router.ask(example.messages())
        said = kind_of(reply)
        out.count(example.kind, said)
        if wrong and said != example.kind:
            wrong(example, reply)
    return out


def evaluate(router):
    """The score of each style on the held-out split."""
    return {style: score(router, "heldout", style) for style in EACH}


def table(scores):
    """Scores as the card shows them."""
    out = ["| requests | right | of | accuracy | valid JSON, no grammar |", "|---|---|---|---|---|"]
    for style, s in scores.items():
        right, valid = 100 * s.right / s.total, 100 * s.valid / s.total
        out.append(f"| {style} | {s.right} | {s.total} | {right:.1f} % | {valid:.1f} % |")
    for style, s in scores.items():
        out += ["", f"By kind, {style} (rows: what is right; columns: what the model said):", ""]
        out.append(f"| | {' | '.join(KINDS)} | invalid | recall | precision |")
        out.append("|---" * (len(KINDS) + 4) + "|")
        for i, kind in enumerate(KINDS):
            row = s.confusion[i]
            column = sum(r[i] for r in s.confusion)
            recall, precision = (100 * row[i] / max(of, 1) for of in (sum(row), column))
            out.append(f"| {kind} | {' | '.join(map(str, row))} | {recall:.1f} % | {precision:.1f} % |")
    return "\n".join(out) + "\n"


def into_card(card, scores):
    """The card with its measured part replaced."""
    before, _, rest = card.partition(BEGIN)
    _, found, after = rest.partition(FINISH)
    if not found:
        raise ValueError(f"the card has no lines {BEGIN} and {FINISH} to put the tables between")
    return f"{before}{BEGIN}\n{table(scores)}{FINISH}{after}"
