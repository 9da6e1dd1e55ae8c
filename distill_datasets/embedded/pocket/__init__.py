"""A real but tiny Qwen3, the texts it learned from, and the command that trains it from nothing.

labels.py       the thirteen labels; formats.py and prompts.py: all the ways to ask for one
corpus.py       the texts, own and collected; queries.py draws varied queries from them
tokenizer.py    trains the tokenizer
network.py      a fast twin of Qwen3 for training; attention.py, optimizer.py: its parts
batches.py      many queries behind one prompt; training.py: the loop
build.py        the command: python -m distill_datasets.embedded.pocket.build
evaluate.py     what the model card states, measured; answers.py and student.py help it
"""
