"""python -m router_model: makes, measures and asks the bundled model."""

import argparse
import json
import os
import sys
from pathlib import Path

from . import gguf
from .evaluate import EACH, Router, Score, evaluate, examples, into_card, kind_of, score, table
from .tokenizer import render

HERE = Path(__file__).parent.parent
MODEL, NUMBERS, CARD = HERE / "model/router.gguf", HERE / "model/evaluation.json", HERE / "MODEL.md"


def replace(path, data):
    """Puts a file in its place whole or not at all."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_bytes(data)
    os.replace(beside, path)


def load(path=MODEL):
    """The model in a file."""
    return Router(*gguf.read(Path(path).read_bytes()))


def numbers():
    """What was measured of the model in the repository."""
    return {style: Score(confusion) for style, confusion in json.loads(NUMBERS.read_text()).items()}


def do_train(arguments):
    from .train import train  # the only verb that needs JAX

    settings = {k: v for k in ("examples", "seed", "rate") if (v := getattr(arguments, k)) is not None}
    model = train(**settings, log=lambda line: print(line, file=sys.stderr, flush=True))
    replace(arguments.model, gguf.write(*model))


def do_evaluate(arguments):
    router = load(arguments.model)
    if arguments.dev:
        for style in EACH:
            wrong = lambda example, reply: print(f"{example.kind:<9} {reply!s:<22} {example.request!r}")  # noqa: E731
            s = score(router, "dev", style, wrong)
            print(f"{style}: {s.right} of {s.total}")
        return
    scores = evaluate(router)
    print(table(scores), end="")
    if arguments.record:
        lines = ",\n".join(f'"{style}": {json.dumps(s.confusion)}' for style, s in scores.items())
        replace(NUMBERS, f"{{\n{lines}\n}}\n".encode())
        replace(CARD, into_card(CARD.read_text(encoding="utf-8"), scores).encode())


def do_reference(arguments):
    router = load(arguments.model)
    for style in EACH:
        for example in examples("heldout", style):
            messages = example.messages()
            tokens = router.tokenizer.prompt(messages)
            line = {"style": style, "right": example.kind, "messages": messages, "prompt": render(messages)}
            reply = router.reply(tokens)
            line |= {"tokens": tokens, "reply": reply, "agent": kind_of(reply)}
            if arguments.logits:
                line["logits"] = [round(float(x), 6) for x in router.run(tokens)[0]]
            print(json.dumps(line))


def do_tokenize(arguments):
    tokenizer = load(arguments.model).tokenizer
    for line in sys.stdin:
        text = json.loads(line)
        print(json.dumps({"text": text, "tokens": tokenizer.encode(text)}))


def do_ask(arguments):
    print(load(arguments.model).ask([("user", arguments.request)]))


def main():
    """Reads the command line and does what it says."""
    parser = argparse.ArgumentParser(prog="router_model", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="the GGUF file (default: %(default)s)")
    verbs = parser.add_subparsers(required=True, metavar="verb")

    def verb(name, does, text):
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(does=does)
        return sub

    sub = verb("train", do_train, "trains a model and writes it as GGUF")
    sub.add_argument("--examples", type=int, help="examples to train on")
    sub.add_argument("--seed", type=int, help="decides about data, first weights and order")
    sub.add_argument("--rate", type=float, help="highest learning rate")
    sub = verb("evaluate", do_evaluate, "measures a model on requests from templates that training never saw")
    sub.add_argument("--dev", action="store_true", help="use the training templates set aside; print what is wrong")
    sub.add_argument("--record", action="store_true", help="put the numbers into model/evaluation.json and the card")
    text = "prints what any program that loads the model must agree with, a JSON object for each held-out request"
    verb("reference", do_reference, text).add_argument("--logits", action="store_true", help="with the scores of the first token")
    verb("tokenize", do_tokenize, "prints the tokens of each line of standard input, which is a JSON string")
    verb("ask", do_ask, "asks a model one question").add_argument("request")
    arguments = parser.parse_args()
    try:
        arguments.does(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"router_model: {error}")


if __name__ == "__main__":
    main()
