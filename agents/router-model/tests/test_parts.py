"""The parts that make the model."""

import random
import unittest

from router_model import gguf, noise
from router_model.data import ANSWER_BEGIN, ANSWER_END, KINDS, TRAINING, Generator, answer, read
from router_model.evaluate import Score, into_card, kind_of
from router_model.grammar import Grammar, GrammarError
from router_model.model import Config, forward, logits, random_weights
from router_model.tokenizer import SPECIAL, Tokenizer

import numpy as np


class Templates(unittest.TestCase):
    def test_a_template_is_expanded_with_slots_and_choices(self):
        grammar = Grammar("[thing]\nphotos\n[main]\n# comment\n(sort|sort) {thing}( now| now) \\(a\\|b\\) {request}")
        self.assertEqual(grammar.sentence("main", random.Random(1), "x"), "sort photos now (a|b) x")

    def test_a_malformed_file_is_refused_with_its_line(self):
        for text, says in (
            ("a", "before the first"),
            ("[s]\n(a", "not closed"),
            ("[s]\n{a", "not closed"),
            ("[s]\na)", "not opened"),
            ("[s]\na|b", "not opened"),
            ("[s]\n{t}", "{t}"),
        ):
            with self.assertRaisesRegex(GrammarError, says):
                Grammar(text)

    def test_a_section_that_names_itself_ends(self):
        self.assertLess(len(Grammar("[s]\na{s}").sentence("s", random.Random(1))), 20)

    def test_no_template_of_the_evaluation_is_trained_on(self):
        def lines(*names):
            text = "\n".join(map(read, names)).splitlines()
            return {line for line in text if line and line[0] not in "#["} - {"{request}"}

        self.assertEqual(lines(*TRAINING) & lines("heldout"), set())

    def test_no_sentence_of_the_evaluation_is_a_sentence_of_training(self):
        rng = random.Random(3)
        seen = {e.request for e in Generator("train").from_each_template(60, "clean", rng)}
        heldout = {e.request for e in Generator("heldout").from_each_template(10, "clean", rng)}
        self.assertEqual(seen & heldout, set())

    def test_a_seed_means_the_same_examples(self):
        first, same, other = (Generator("train").from_each_template(1, "mixed", random.Random(s)) for s in (1, 1, 2))
        self.assertEqual(first, same)
        self.assertNotEqual(first, other)

    def test_every_kind_has_examples_in_every_split_and_style(self):
        rng = random.Random(5)
        for split in ("train", "dev", "heldout"):
            for kind in KINDS:
                for style in ("clean", "noisy", "long", "mixed"):
                    example = Generator(split).example(kind, style, rng)
                    self.assertTrue(example.request.strip())
                    self.assertEqual(example.kind, kind)

    def test_any_text_can_be_disturbed(self):
        rng = random.Random(1)
        for text in ("", " ", "a", "abcd", "été où naïve", "日本語の文章です ok", "a  b"):
            for _ in range(200):
                noise.disturb(text, rng)
                noise.tidy(text, rng)


class Numbers(unittest.TestCase):
    def test_tokens_come_back_as_the_text_they_were(self):
        tokenizer = Tokenizer.train(["sort my photos", "sort the photos by year"] * 3, 300)
        self.assertLess(len(tokenizer.encode("sort my photos")), 8)
        for text in ("", " ", "été", "日本語 ok\n\n  x", "a\u0301b\u200d👩‍👩‍👧", "<|im_end|>", "\0\x01\x7f\U0010ffff"):
            tokens = tokenizer.encode(text)
            self.assertEqual(tokenizer.decode(tokens), text)
            self.assertFalse([t for t in tokens if t < len(SPECIAL)], text)

    def test_tokens_one_by_one_give_the_scores_of_all_at_once(self):
        config = Config(vocabulary=50)
        weights = random_weights(config, 1)
        tokens = np.random.default_rng(1).integers(0, 50, (1, 20))
        states, _ = forward(np, config, weights, tokens)
        past = None
        for i in range(20):
            one, past = forward(np, config, weights, tokens[:, i : i + 1], past)
            np.testing.assert_allclose(logits(weights, one), logits(weights, states[:, i : i + 1]), atol=1e-4)

    def test_a_text_past_the_context_is_an_error(self):
        config = Config(vocabulary=50, context=8)
        with self.assertRaisesRegex(ValueError, "9 tokens do not fit into a context of 8"):
            forward(np, config, random_weights(config, 1), np.zeros((1, 9), int))

    def test_only_the_whole_form_is_an_answer(self):
        for kind in KINDS:
            self.assertEqual(answer(kind), ANSWER_BEGIN + kind + ANSWER_END)
            self.assertEqual(kind_of(answer(kind)), kind)
        for wrong in ('{"agent":"cook"}', '{"agent":"files"', "files", '{"agent":"files","x":1}', '["files"]', None):
            self.assertIsNone(kind_of(wrong))

    def test_a_score_counts_what_is_right_and_what_is_valid(self):
        score = Score()
        for said in ("files", "code", None):
            score.count("files", said)
        self.assertEqual((score.right, score.total, score.valid), (1, 3, 2))

    def test_only_the_measured_part_of_a_card_changes(self):
        score = Score()
        score.count("files", "files")
        card = into_card("a\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nb\n", {"clean": score})
        self.assertTrue(card.startswith("a\n") and card.endswith("\nb\n") and "old" not in card)
        with self.assertRaisesRegex(ValueError, "no lines"):
            into_card("no place", {})

    def test_a_file_that_is_none_is_refused(self):
        config = Config(vocabulary=259, layers=1)
        good = gguf.write(config, random_weights(config, 1), Tokenizer.train(["a"], 259))
        gguf.read(good)
        for bad in (b"", b"GGUF", b"not a model at all", good[:100], good[:-40], good[:4] + b"\1" + good[5:]):
            with self.assertRaises(gguf.GgufError):
                gguf.read(bad)


if __name__ == "__main__":
    unittest.main()
