"""Requests with the agent that should get each: made from the templates under data/, then disturbed.

Three grammars share the fillers of slots.txt: training, a part of the training templates that is set aside to choose
by ("dev"), and the evaluation ("heldout"), whose templates, frames and many fillers training never sees.
"""

from dataclasses import dataclass, field
from pathlib import Path

from . import noise
from .grammar import Grammar

KINDS = ("task", "code", "files", "pipeline", "inference", "unknown")
"""Kinds of agents, as they stand in the answer, in the order of tables."""

ANSWER_BEGIN, ANSWER_END = '{"agent":"', '"}'

DATA = Path(__file__).parent.parent / "data"
TRAINING = ("frames", *KINDS)
DEV_EVERY = 10  # every n-th training template is set aside
LONG_WORDS = 330  # of system message before a request of style "long": more than 512 tokens


def answer(kind):
    """The whole answer of the model: a JSON object with one key."""
    return f"{ANSWER_BEGIN}{kind}{ANSWER_END}"


@dataclass
class Example:
    """A request and the agent that should get it."""

    request: str
    kind: str
    system: str | None = None
    earlier: list = field(default_factory=list)  # (request, kind) of turns before

    def messages(self):
        """The conversation, (role, content) each."""
        out = [("system", self.system)] if self.system else []
        for request, kind in self.earlier:
            out += [("user", request), ("assistant", answer(kind))]
        return [*out, ("user", self.request)]


def read(name):
    """The text of a file of templates."""
    return (DATA / f"{name}.txt").read_text(encoding="utf-8")


class Generator:
    """Makes examples of one split: "train", "dev" or "heldout".

    Styles: "clean", as the templates have it; "noisy", with typing errors, lost words, odd capitals and punctuation;
    "long", clean behind hundreds of words of system message; "mixed", what the model is trained on: all of these.
    """

    def __init__(self, split):
        names = ("heldout",) if split == "heldout" else TRAINING
        self.grammar = Grammar(*map(read, ("slots", "background", *names)))
        self.templates = {}
        for kind in KINDS:
            for section, frame in ((kind, "frame"), (f"{kind}.raw", "aside")):
                for index, template in enumerate(self.grammar.section(section)):
                    set_aside = index % DEV_EVERY == DEV_EVERY - 1
                    if split == "heldout" or set_aside == (split == "dev"):
                        self.templates.setdefault(kind, []).append((template, frame))

    def example(self, kind, style, rng):
        """An example of this kind from a random template."""
        templates = self.templates[kind]
        return self._from(templates[int(rng.random() * len(templates))], kind, style, rng)

    def from_each_template(self, each, style, rng):
        """`each` examples from every template of every kind, so that no template weighs more than another."""
        return [
            self._from(template, kind, style, rng)
            for kind in KINDS
            for template in self.templates[kind]
            for _ in range(each)
        ]

    def _from(self, template, kind, style, rng):
        template, frame = template
        text = self.grammar.sentence(frame, rng, self.grammar.expand(template, rng))
        if style == "mixed" and kind == "unknown" and rng.random() < 0.05:
            text = noise.gibberish(rng)
        careless = style == "noisy" or (style == "mixed" and rng.random() < 0.5)
        example = Example((noise.disturb if careless else noise.tidy)(text, rng), kind)
        if style == "long":
            example.system = self._background(LONG_WORDS, rng)
        elif style == "mixed":
            self._surround(example, rng)
        return example

    def _surround(self, example, rng):
        """A system message and an earlier turn, in a part of the examples."""
        if rng.random() < 0.008:
            example.system = self._background(20 + rng.randrange(LONG_WORDS), rng)
        elif rng.random() < 0.1:
            example.system = noise.tidy(self.grammar.sentence("system", rng), rng)
        if rng.random() < 0.04:
            kind = rng.choice(KINDS)
            example.earlier.append((self.example(kind, "clean", rng).request, kind))

    def _background(self, words, rng):
        """Text of at least so many words that says nothing about the request."""
        sentences, count = [], 0
        while count < words:
            sentences.append(noise.capital(self.grammar.sentence("background", rng)))
            count += len(sentences[-1].split(" "))
        return " ".join(sentences)
