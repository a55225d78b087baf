"""The model file, through the engine that serves it."""

import os
import unittest

from router_model.__main__ import MODEL, numbers
from router_model.evaluate import evaluate
from router_model.served import Served

PROGRAM = os.environ.get("ARK_INFERENCE")


@unittest.skipUnless(PROGRAM, "ARK_INFERENCE names no ark-inference")
class Engine(unittest.TestCase):
    def test_it_is_as_good_as_the_card_says(self):
        server = Served(PROGRAM, MODEL)
        self.addCleanup(server.close)
        for style, now in evaluate(server).items():
            card = numbers()[style]
            # The engine adds up in another order than numpy, which decides where two replies are as likely.
            close = card.total // 200
            self.assertGreaterEqual(now.right, card.right - close, style)
            self.assertGreaterEqual(now.valid, card.valid - close, style)
            print(f"{style}: {now.right} of {now.total} right, {now.valid} valid")


if __name__ == "__main__":
    unittest.main()
