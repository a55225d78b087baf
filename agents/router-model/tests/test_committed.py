"""The model file in the repository is what its card says."""

import unittest

from router_model import gguf
from router_model.__main__ import CARD, MODEL, load, numbers
from router_model.data import KINDS, answer
from router_model.evaluate import evaluate, into_card
from router_model.tokenizer import CHAT_TEMPLATE, SPECIAL


class Committed(unittest.TestCase):
    def test_the_card_shows_what_was_measured(self):
        card = CARD.read_text(encoding="utf-8")
        self.assertEqual(into_card(card, numbers()), card, "run train.sh evaluate")

    def test_the_file_is_as_good_as_its_card_says(self):
        for style, now in evaluate(load()).items():
            card = numbers()[style]
            self.assertEqual(now.total, card.total, f"{style}: the card was measured on other requests")
            self.assertGreaterEqual(now.right, card.right, style)
            self.assertGreaterEqual(now.valid, card.valid, style)

    def test_the_file_is_well_formed(self):
        data = MODEL.read_bytes()
        metadata, tensors = gguf.parse(data)
        self.assertEqual(metadata["general.architecture"], "llama")
        self.assertEqual(metadata["tokenizer.chat_template"], CHAT_TEMPLATE)
        self.assertEqual(tuple(metadata["tokenizer.ggml.tokens"][: len(SPECIAL)]), SPECIAL)
        config, weights, tokenizer = gguf.read(data)
        self.assertEqual(list(tensors), list(config.shapes()))
        self.assertGreaterEqual(config.context, 1024)
        self.assertEqual(gguf.write(config, weights, tokenizer), data, "what is written again is the same file")

    def test_a_kind_is_one_token(self):
        tokenizer = load().tokenizer
        for kind in KINDS:
            self.assertEqual(len(tokenizer.encode(kind)), 1, kind)
            self.assertLessEqual(len(tokenizer.encode(answer(kind))), 6, kind)


if __name__ == "__main__":
    unittest.main()
