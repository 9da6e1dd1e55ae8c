"""Whatever answers: the Sampler protocol, model references, and a backend for each kind.

sampler.py      the protocol: messages in, samples and token counts out; the digest of a request
references.py   `pocket`, `openai:gpt-5` and the like: what each names, opened or connected to
endpoint.py     an address over HTTP, its key and its proxy
openai.py       servers of OpenAI's protocol, and their batches; openai_wire.py: its bodies
tinker.py       servers of Tinker's protocol, by the SDK; processes.py: spread over processes
retry.py        whether a request that failed is asked again
renderers.py    chats to tokens and back; chat_template.py: by the tokenizer's own template
scoring.py      log-probabilities of a text that was not sampled
"""
