"""A dataset's whole life on the Hub, on a Hub of this machine: python -m tests.round_trip.

Publishes 1.0.0, edits the card by hand, adds queries, publishes 1.1.0, loads both, runs the
release again from its ledger, trains on it, and pushes the student. Needs no key and no network.
"""

import json
import sqlite3
import sys
import tempfile
from pathlib import Path

from tests.support.hub_fixture import Hub

REPO, STUDENT = "me/languages", "me/languages-student"
NOTE = "\n## Notes\n\nA person wrote this on the website.\n"
MORE = [
    ("Where did you put the blue bowl?", "en"),
    ("Wohin hast du die blaue Schüssel gestellt?", "de"),
    ("¿Dónde has puesto el cuenco azul?", "es"),
]
LOAD = f"""
from datasets import load_dataset
for version in ("v1.0.0", "v1.1.0"):
    rows = load_dataset("{REPO}", revision=version)
    print(version, {{split: len(part) for split, part in rows.items()}})
"""


def run(hub: Hub, *arguments: str) -> str:
    """Run a verb as a user would; its output, or the end."""
    print("$ distill-datasets", *arguments)
    done = hub.run(["-m", "distill_datasets", *arguments])
    if done.returncode:
        sys.exit(done.stderr)
    print(done.stdout)
    return done.stdout


def push(hub: Hub, *arguments: str) -> None:
    """Push, and count the requests besides those that carry files."""
    hub.forget()
    run(hub, *arguments)
    calls = [seen for seen in hub.log() if "/lfs/" not in seen.path and seen.name == "127.0.0.1"]
    print(f"  {len(calls)} API calls besides uploads\n")


def add_queries(folder: Path) -> None:
    """Three more sentences of a person's own."""
    with (folder / "queries.jsonl").open("a", encoding="utf-8") as file:
        for query, reference in MORE:
            file.write(json.dumps({"query": query, "reference": reference}) + "\n")


def bought(journal: Path) -> int:
    """How many answers of a run were paid for there."""
    with sqlite3.connect(journal) as database:
        return int(database.execute("SELECT total(times_bought) FROM answers").fetchone()[0])


def main() -> None:
    """Go round once."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        hub = Hub(folder)
        run(hub, "new", "languages")
        run(hub, "generate", "languages", "--out", "run")
        push(hub, "publish", "run", "--push-to-hub", REPO)
        card = hub.files(REPO)["README.md"]
        hub.change(REPO, {"README.md": card + NOTE.encode()})
        add_queries(folder / "languages")
        run(hub, "generate", "languages", "--out", "run")
        push(hub, "publish", "run", "--push-to-hub", REPO)
        assert NOTE.strip().encode() in hub.files(REPO)["README.md"], "the note was lost"
        print(hub.run(LOAD).stdout)
        run(hub, "diff", f"{REPO}@v1.0.0", f"{REPO}@v1.1.0")
        run(hub, "generate", f"{REPO}@v1.1.0", "--out", "again")
        print(f"  {bought(folder / 'again/journal.sqlite')} answers bought\n")
        run(hub, "train", f"{REPO}@v1.1.0", "--student", "pocket", "--out", "run/train")
        run(hub, "measure", "run", "--dataset", f"{REPO}@v1.1.0", "--split", "test")
        push(hub, "push", "run/train", STUDENT)
        print(STUDENT, *sorted(hub.files(STUDENT, kind="models")))
        astray = [seen for seen in hub.log() if seen.elsewhere or seen.leak]
        print(f"requests to other hosts, or with a token to one: {len(astray)}")
        hub.server.stop()


if __name__ == "__main__":
    main()
