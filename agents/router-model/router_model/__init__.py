"""The bundled model: routes a request in plain English to a kind of agent and answers as JSON.

    data/*.txt --grammar--> examples --tokenizer--> train --gguf--> model/router.gguf --evaluate--> MODEL.md

Training needs JAX; all else needs numpy and regex alone.
"""
