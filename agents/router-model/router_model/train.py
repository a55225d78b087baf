"""Training: fresh examples all the time, AdamW, a learning rate that rises quickly and falls slowly.

What counts is the kind's token in the answer. The rest of the answer and a part of the prompt count a little, so that
the form is learned and words get meanings.
"""

import math
import random
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .data import KINDS, Generator, answer
from .evaluate import Router, score
from .model import Config, forward, logits, random_weights
from .tokenizer import END, PAD, SPECIAL, Tokenizer

SEED = 7
EXAMPLES = 30_000
RATE = 3e-3
FORM_WEIGHT = 0.05  # of a token of the answer that is not the kind's
PROMPT_WEIGHT, PROMPT_SHARE = 0.1, 0.15  # of a token of the prompt, and how many of them are looked at
TOKEN_NOISE = 0.04  # tokens of a prompt that are replaced by random ones, so that no single word decides
SHAPES = ((40, 40), (80, 20), (640, 3))  # longest text and number of texts of a batch, by length
DECAY, BETA1, BETA2, LONGEST_GRADIENT = 0.05, 0.9, 0.98, 1.0


def vocabulary(size=Config.vocabulary, seed=SEED):
    """Learns the tokenizer from examples of the training split."""
    rng, texts = random.Random(seed), []
    for example in Generator("train").from_each_template(15, "clean", rng):
        # In lower case and with a space before it, a word is one token wherever it stands.
        texts += [f"user\n{example.request}", f" {example.request.lower()}", answer(example.kind)]
        texts += ["assistant\n", "system\n"]
    return Tokenizer.train(texts, size)


def _text(example, tokenizer, rng):
    """The tokens of an example and the weight of each in the loss."""
    prompt = tokenizer.prompt(example.messages())
    weights = [PROMPT_WEIGHT if rng.random() < PROMPT_SHARE else 0.0 for _ in prompt]
    for i, token in enumerate(prompt):
        if token > END and rng.random() < TOKEN_NOISE:
            prompt[i] = len(SPECIAL) + int(rng.random() * (len(tokenizer.tokens) - len(SPECIAL)))
    reply = [*tokenizer.encode(answer(example.kind)), END]
    kind = tokenizer.encode(example.kind)
    return prompt + reply, weights + [1.0 if t in kind else FORM_WEIGHT for t in reply]


def batches(tokenizer, rng):
    """Batches without end: tokens and weights, padded to one of SHAPES. A text longer than all is left out."""
    generator = Generator("train")
    waiting = {shape: [] for shape in SHAPES}
    while True:
        example = generator.example(KINDS[int(rng.random() * len(KINDS))], "mixed", rng)
        text = _text(example, tokenizer, rng)
        shape = next((s for s in SHAPES if len(text[0]) <= s[0]), None)
        if shape is None:
            continue
        waiting[shape].append(text)
        if len(waiting[shape]) == shape[1]:
            length = shape[0]
            tokens = np.array([t + [PAD] * (length - len(t)) for t, _ in waiting[shape]], np.int32)
            weights = np.array([w + [0.0] * (length - len(w)) for _, w in waiting[shape]], np.float32)
            waiting[shape] = []
            yield tokens, weights


def _loss(weights, config, tokens, rows, targets, importance, texts):
    """Minus the log likelihood of the targets after the states in these rows, for each text."""
    states = forward(jnp, config, weights, tokens)[0].reshape(-1, config.width)[rows]
    likely = jax.nn.log_softmax(logits(weights, states))
    likely = jnp.take_along_axis(likely, targets[:, None], axis=1)[:, 0]
    return -jnp.sum(likely * importance) / texts


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2, 3))
def _step(config, weights, mean, square, rate, step, batch):
    """One step of AdamW, with gradients that are too long shortened."""
    loss, gradients = jax.value_and_grad(_loss)(weights, config, *batch)
    length = jnp.sqrt(sum(jnp.sum(g * g) for g in gradients.values()))
    short = jnp.minimum(1.0, LONGEST_GRADIENT / (length + 1e-6))
    for name, gradient in gradients.items():
        gradient = gradient * short
        mean[name] = BETA1 * mean[name] + (1 - BETA1) * gradient
        square[name] = BETA2 * square[name] + (1 - BETA2) * gradient * gradient
        update = mean[name] / (1 - BETA1**step) / (jnp.sqrt(square[name] / (1 - BETA2**step)) + 1e-8)
        decay = DECAY * weights[name] if weights[name].ndim > 1 else 0.0
        weights[name] = weights[name] - rate * (update + decay)
    return weights, mean, square, loss


def _rows(tokens, weights):
    """Which states predict something that counts, padded to a fixed number: their rows, targets and weights."""
    count = tokens.shape[0] * tokens.shape[1] * 2 // 5
    rows = np.flatnonzero(weights[:, 1:].ravel())[:count]
    text, at = np.divmod(rows, tokens.shape[1] - 1)
    pad = (0, count - len(rows))
    return (
        np.pad(text * tokens.shape[1] + at, pad).astype(np.int32),
        np.pad(tokens[text, at + 1], pad),
        np.pad(weights[text, at + 1], pad),
    )


def schedule(done):
    """The learning rate's share of its highest when this share of training is done."""
    if done < 0.06:
        return (done + 1e-3) / 0.061
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - 0.06) / 0.94))


def train(examples=EXAMPLES, seed=SEED, rate=RATE, log=print):
    """Trains a model; gives back its sizes, weights and tokenizer."""
    begun = time.monotonic()
    tokenizer = vocabulary(seed=seed)
    config = Config(vocabulary=len(tokenizer.tokens))
    first = random_weights(config, seed)
    log(f"{config.vocabulary} tokens, {sum(w.size for w in first.values())} parameters, {time.monotonic() - begun:.0f} s")
    weights = {n: jnp.asarray(w) for n, w in first.items()}
    mean, square = ({n: jnp.zeros_like(w) for n, w in weights.items()} for _ in range(2))
    seen, step, average = 0, 0, None
    for tokens, importance in batches(tokenizer, random.Random(seed + 1)):
        step += 1
        batch = (tokens, *_rows(tokens, importance), np.float32(len(tokens)))
        now = np.float32(rate * schedule(seen / examples))
        weights, mean, square, loss = _step(config, weights, mean, square, now, np.float32(step), batch)
        seen += len(tokens)
        average = float(loss) if average is None else 0.97 * average + 0.03 * float(loss)
        if step % 25 == 0:
            log(f"[{time.monotonic() - begun:5.0f} s, {time.process_time():.0f} s of CPU] {seen} of {examples} examples, loss {average:.3f}")
        if seen >= examples:
            break
    weights = {n: np.asarray(w) for n, w in weights.items()}
    dev = score(Router(config, weights, tokenizer), "dev", "clean")
    log(f"[{time.monotonic() - begun:5.0f} s] dev set: {dev.right} of {dev.total} right")
    return config, weights, tokenizer
