"""Whatever answers: the Sampler protocol, model references, and a backend for each kind."""
