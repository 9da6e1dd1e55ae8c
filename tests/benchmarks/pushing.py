"""Peak memory and time of publishing 1,000,000 rows of 1 KB, folder and push.

    python -m tests.benchmarks.pushing [rows]

The answers are made first, in a process of their own; then `publish` and `push_release` run in
one process each, against the test Hub. Memory is the process's peak: private memory, and with the
pages of the memory-mapped answers, which the system takes back whenever it needs them.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.hub_fixture import Hub

ROWS = 1_000_000
MAKE = """
import json, random, sys
from datasets import Dataset
from distill_datasets.schema import answer_features
from tests.support.releases import greetings
from pathlib import Path
run, rows = Path(sys.argv[1]), int(sys.argv[2])
recipe = greetings(run / "recipe", response="{{ text }}")
def made():
    draw = random.Random(0)
    for number in range(rows):
        text = f"{number} " + draw.randbytes(230).hex()
        yield {**dict.fromkeys(answer_features()), "id": f"id{number}", "query": text,
               "group": str(number), "split": "train", "sample": 0, "teacher": "pocket",
               "raw": text, "stop_reason": "stop", "answer": None, "response": text}
rows = Dataset.from_generator(made, features=answer_features(), cache_dir=str(run / "cache"))
rows.save_to_disk(str(run / "answers"))
recipe.dump(run / "answers" / "recipe")
facts = {"recipe_digest": recipe.digest, "teacher": "pocket", "identity": "pocket/0",
         "renderer": None, "sampling": {}, "rows": len(rows), "errors": 0,
         "tokens": {"prompt": 0, "cached": 0, "response": 0},
         "created": "2026-11-21", "versions": {}}
(run / "answers" / "generation.json").write_text(json.dumps(facts))
"""
WATCHED = """
import json, sys, threading, time
from pathlib import Path
peak = [0, 0]
def watch():
    while True:
        lines = dict(l.split(":") for l in Path("/proc/self/status").read_text().splitlines())
        kb = [int(lines[key].split()[0]) for key in ("RssAnon", "VmHWM")]
        peak[0], peak[1] = max(peak[0], kb[0]), kb[1]
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
start = time.time()
{work}
time.sleep(0.1)
print(json.dumps([round(time.time() - start, 1), *(kb // 1024 for kb in peak)]))
"""
PUBLISH = WATCHED.replace(
    "{work}",
    "from distill_datasets.releases.release import publish\nsizes = publish(sys.argv[1]).splits",
)
PUSH = WATCHED.replace(
    "{work}",
    "from distill_datasets.releases.push import push_release\n"
    "push_release(Path(sys.argv[1]) / 'release', 'me/large')",
)


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with tempfile.TemporaryDirectory() as folder:
        hub, run = Hub(Path(folder)), Path(folder) / "run"
        run.mkdir()
        try:
            subprocess.run([sys.executable, "-c", MAKE, str(run), str(rows)], check=True)
            for name, code in (("publish", PUBLISH), ("push", PUSH)):
                done = hub.run(["-c", code, str(run)])
                if done.returncode:
                    raise SystemExit(done.stderr)
                seconds, private, resident = json.loads(done.stdout.splitlines()[-1])
                print(f"{name}: {rows:,} rows, {seconds} s, peak {private} MB private, "
                      f"{resident} MB resident")  # fmt: skip
            size = sum(path.stat().st_size for path in (run / "release").rglob("*.parquet"))
            print(f"release: {size / 1e6:.0f} MB of Parquet")
        finally:
            hub.server.stop()


if __name__ == "__main__":
    main()
