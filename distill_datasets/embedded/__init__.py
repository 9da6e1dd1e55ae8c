"""A loopback server that speaks Tinker's wire protocol over torch, and the model it ships with.

process.py      launch(): the server as a child process that ends with its parent
__main__.py     that child
server.py       the HTTP application, and serve(): the same in the foreground
training_api.py the endpoints that train, save and load; listings.py: those that list
sample_wire.py, train_wire.py  protobuf and JSON to plain dataclasses, and back; wire.py: tensors
futures.py      results that clients collect later
worker.py       the one thread that computes: training in order, samples in batches
base.py         the frozen base model; lora.py: adapters over it; attention.py: shared prefixes
batching.py     which requests run together; prefixes.py: cached prompts
decoding.py     batched sampling; choosing.py: from logits to a token; scoring.py: prompts' logprobs
trainer.py      gradients and Adam; losses.py: what is minimised
checkpoints.py  what survives a restart; executed.py: what was trained, in order
"""
