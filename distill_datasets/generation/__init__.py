"""Queries become answered rows: teachers asked, every answer paid for once.

run.py          generate(): from the recipe to the folder of a run
rows.py         one row a query, by `datasets.map`; a failure is a value in its row
teachers.py     who answers, and which of several answers is kept; examples.py: behind what
client.py       a request: answered before, or asked, and asked again
cache.py        the journal of paid answers, on disk before anything reads one
ledger.py       the raw answers in a release, so that nobody pays for them again
rate_limit.py   how fast a sampler is asked
pricing.py      prices, what was spent, and the budget that ends a run
dry_run.py      requests, tokens, money and time of a run before it is paid for
batch_api.py    answers at half the price, in a provider's batches
shards.py       one run on several machines
settings.py     how fast, how many, and which way
"""
