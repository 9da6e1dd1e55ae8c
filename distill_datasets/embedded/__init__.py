"""A loopback server that speaks Tinker's wire protocol over torch, and the model it ships with.

process.py    launch(): the server as a child process that ends with its parent
app.py        the HTTP application, and that child; endpoints.py: what it answers
wire.py       protobuf and JSON to plain dataclasses, and back; the limits of a request
service.py    sessions, results that clients collect later, and the order of training
engine.py     all that is computed, on one thread: training in order, samples in batches
model.py      the frozen base model; lora.py: adapters over it
weights.py    the weights that samples are drawn from, and the prefixes that each has cached
scheduler.py  which requests run together, and behind which cached prefix
decoding.py   batched sampling and the logprobs of prompts; prefix_attention.py: shared prefixes
constraints.py  a JSON schema that a sample is held to
trainer.py    rows, losses, gradients and Adam
store.py      what survives a restart: checkpoints, and the log of what was trained
pocket/       the model that ships, and how it is built
"""
