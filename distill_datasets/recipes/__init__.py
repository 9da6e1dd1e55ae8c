"""What to ask and how to read the answer: recipes, prompts, queries."""
