"""The verbs about recipes, with their flags: recipes, new."""

import argparse
from pathlib import Path


def list_recipes(options: argparse.Namespace) -> None:
    """Name the recipes that ship, and what each is about."""
    from distill_datasets.recipes.loading import shipped_recipes

    for recipe in shipped_recipes():
        print(f"{recipe.name:<24}{recipe.description}")


def add_new(parser: argparse.ArgumentParser) -> None:
    """The flags of `new`."""
    parser.add_argument("name", help="the recipe's name")
    parser.add_argument("--folder", type=Path, help="the folder to make (default: ./NAME)")


def new(options: argparse.Namespace) -> None:
    """Make a recipe's folder that runs as it is."""
    from distill_datasets.recipes.scaffold import new_recipe

    folder = new_recipe(options.name, options.folder)
    print(f"made {folder}/: edit prompt.md, queries.jsonl and recipe.yaml, then")
    print(f"  distill-datasets run {folder} --out runs/{folder.name}")
