"""Tokens that a student saves on each query of every recipe that ships.

python -m tests.benchmarks.prompt_tokens [FOLDER OF A MODEL]

The prompts of teacher and student are rendered by the model's own chat template (without a folder
the pocket model's), with the tools that each is given, for every query. Asks nobody.
"""

import sys
from pathlib import Path
from statistics import fmean

from distill_datasets.files import pocket_folder
from distill_datasets.models.renderers import CHAT_TEMPLATE, open_renderer
from distill_datasets.recipes.loading import shipped_recipes
from distill_datasets.recipes.queries import load_queries
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.tables import aligned


def tokens(recipe: Recipe, renderer: object) -> tuple[float, float]:
    """Mean prompt tokens of the teacher, and of the student."""
    from distill_datasets.models.renderers import Prompts

    teacher, student = Prompts(renderer), Prompts(renderer)
    plain = recipe.sampling_parameters
    sides: tuple[list[int], list[int]] = ([], [])
    for query in load_queries(recipe)["query"]:
        asked = recipe.fitted(query, plain)
        sides[0].append(len(teacher.tokens(recipe.messages(query), asked.tools)))
        own = recipe.fitted_to_student(query, plain)
        sides[1].append(len(student.tokens(recipe.student_messages(query), own.tools)))
    return fmean(sides[0]), fmean(sides[1])


def main() -> None:
    """Print the table."""
    from transformers import AutoTokenizer

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else pocket_folder()
    renderer = open_renderer(CHAT_TEMPLATE, AutoTokenizer.from_pretrained(folder))
    rows = [["recipe", "queries", "teacher", "student", "saved"]]
    for recipe in shipped_recipes():
        with_prompt, without = tokens(recipe, renderer)
        count = len(load_queries(recipe))
        saved = f"{with_prompt - without:,.0f}"
        rows.append([recipe.name, f"{count:,}", f"{with_prompt:,.0f}", f"{without:,.0f}", saved])
    print(aligned(rows))


if __name__ == "__main__":
    main()
