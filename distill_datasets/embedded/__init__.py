"""A loopback server that speaks Tinker's wire protocol over torch, and the model it ships with.

process.py    launch(): the server as a child process that ends with its parent
app.py        the HTTP application: keys, refusals, and what each endpoint answers
wire.py       protobuf and JSON to plain dataclasses, and back; the limits of a request
engine.py     sessions and promised results; all that is computed, on one thread
model.py      the frozen base model, and what it takes on this machine; lora.py: adapters over it
conversion.py an adapter's layout; a GGUF file, or an adapter over its base, as a model folder
scheduler.py  which requests run together, with which weights, and behind which cached prefix
batching.py   batched sampling and the logprobs of prompts; prefix_attention.py: shared prefixes
logits.py     the next token, a JSON schema that it is held to, and how likely a prompt is
trainer.py    rows, losses, gradients and Adam
store.py      what survives a restart: checkpoints, and the log of what was trained
pocket/       the model that ships, and how it is built
"""
