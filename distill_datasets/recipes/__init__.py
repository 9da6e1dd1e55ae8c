"""What to ask and how to read the answer: recipes, prompts, queries.

recipe.py    a recipe; keys.py: its keys; sections.py: those under them, the splits too
loading.py   finds one by name, folder or release, says what is wrong, starts a new one
prompt.py    the prompt and its templates, the examples behind it, the canaries within
queries.py   a table of queries; user_files.py: the CSV, JSON, YAML … that they lie in
mix.py       rows of something else for the train split
tools.py     the catalogue of tools, and other forms that it is made of
parsing.py   from a response to an answer, its tool calls too, or a rejection
checks.py    whether a text does what the prompt demands
"""
