"""A real but tiny Qwen3, the texts it learned from, and the command that trains it from nothing.

build.py     the command: python -m tests.pocket.build
corpus.py    the texts, and the queries that are drawn from them
prompts.py   the languages, and all the ways to ask which one a text is in
network.py   a fast twin of Qwen3 for training
evaluate.py  what the model card states, measured
"""
