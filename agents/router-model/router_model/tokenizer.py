"""Byte-level BPE with the word splitting of GPT-2, which llama.cpp knows as model `gpt2`, pre-tokenizer `gpt-2`.

Every byte is a token, so that any text has tokens. Special tokens are not found in text: a user who types
`<|im_end|>` gets its letters.
"""

from collections import Counter, defaultdict

import regex

PAD, START, END = 0, 1, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The chat template as it stands in the GGUF; `render` gives the same without a template engine."""

WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def _byte_letters():
    """GPT-2's letter for each byte: itself where it can be seen, else one from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(hidden)}


LETTER = _byte_letters()
BYTE = {letter: byte for byte, letter in LETTER.items()}


def _spell(word):
    return tuple(LETTER[b] for b in word.encode())


def _join(word, pair):
    """The word with every such pair of neighbours made one, from the left."""
    out, at = [], 0
    while at < len(word):
        if at + 1 < len(word) and (word[at], word[at + 1]) == pair:
            out.append(word[at] + word[at + 1])
            at += 2
        else:
            out.append(word[at])
            at += 1
    return tuple(out)


class Tokenizer:
    """Tokens by number, and merges, the first ones first."""

    def __init__(self, tokens, merges):
        self.tokens, self.merges = list(tokens), [tuple(m) for m in merges]
        self.number = {token: i for i, token in enumerate(self.tokens)}
        self.rank = {merge: i for i, merge in enumerate(self.merges)}
        self._known = {}

    @classmethod
    def train(cls, texts, size):
        """Learns a vocabulary of `size` tokens: the most frequent pair is merged, ties by the letters."""
        counts = Counter(word for text in texts for word in WORDS.findall(text))
        words = [_spell(w) for w in counts]
        count = list(counts.values())
        pairs, where = Counter(), defaultdict(set)
        for i, word in enumerate(words):
            for pair in zip(word, word[1:]):
                pairs[pair] += count[i]
                where[pair].add(i)
        tokens, merges = [*SPECIAL, *sorted(BYTE)], []
        while len(tokens) < size and pairs:
            most = max(pairs.values())
            if most < 2:
                break
            best = max(pair for pair, n in pairs.items() if n == most)
            merges.append(best)
            tokens.append(best[0] + best[1])
            for i in where.pop(best):
                for pair in zip(words[i], words[i][1:]):
                    pairs[pair] -= count[i]
                words[i] = _join(words[i], best)
                for pair in zip(words[i], words[i][1:]):
                    pairs[pair] += count[i]
                    where[pair].add(i)
            del pairs[best]
        return cls(tokens, merges)

    def _word(self, word):
        found = self._known.get(word)
        if found is None:
            parts = _spell(word)
            while len(parts) > 1:
                best = min(zip(parts, parts[1:]), key=lambda p: self.rank.get(p, len(self.rank)))
                if best not in self.rank:
                    break
                parts = _join(parts, best)
            found = [self.number[p] for p in parts]
            if len(self._known) < 100_000:
                self._known[word] = found
        return found

    def encode(self, text):
        """The tokens of a text."""
        return [token for word in WORDS.findall(text) for token in self._word(word)]

    def decode(self, tokens):
        """The text of tokens; special ones have none."""
        letters = "".join(self.tokens[t] for t in tokens if t >= len(SPECIAL))
        return bytes(BYTE[letter] for letter in letters).decode(errors="replace")

    def prompt(self, messages):
        """The tokens of a conversation up to where the model answers: what the chat template makes of it."""
        out = []
        for role, content in messages:
            out += [START, *self.encode(f"{role}\n{content}"), END, *self.encode("\n")]
        return [*out, START, *self.encode("assistant\n")]


def render(messages):
    """A conversation as the chat template writes it."""
    turns = "".join(f"{SPECIAL[START]}{role}\n{content}{SPECIAL[END]}\n" for role, content in messages)
    return f"{turns}{SPECIAL[START]}assistant\n"
