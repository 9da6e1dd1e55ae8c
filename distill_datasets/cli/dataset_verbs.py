"""The verbs that make a dataset: generate, synthesize, publish, diff."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_datasets.errors import DistillError

# What a run in parts on Ray doesn't take, and what stands there when it wasn't asked for.
_NOT_ON_RAY = {
    "limit": None,
    "ledger": True,
    "rpm": None,
    "tpm": None,
    "prices": None,
    "budget": None,
    "processes": 1,
    "batch": False,
    "shard": None,
    "stream": False,
}

if TYPE_CHECKING:
    from distill_datasets.generation.pricing import Meter
    from distill_datasets.generation.run import Generated
    from distill_datasets.generation.shards import Share
    from distill_datasets.releases.release import Release


def generate(options: argparse.Namespace) -> None:
    """Ask the teachers, or only say what that would take."""
    from distill_datasets.generation.shards import Share

    _require_fitting(options)
    share = Share.parse(options.shard) if options.shard else None
    if options.dry_run:
        _rehearse(options, share)
    elif options.ray:
        _generate_on_ray(options)
    else:
        report_answers(ask_teachers(options, share))


def _require_fitting(options: argparse.Namespace) -> None:
    """Refuse flags that would have no effect beside the others."""
    from distill_datasets.errors import SettingsError

    if options.sample and not options.dry_run:
        raise SettingsError(
            "--sample asks rows for the forecast of a --dry-run: add that, or ask for the first "
            "rows with --limit."
        )
    if options.batch and options.stream:
        raise SettingsError("A batch has no first token to time: leave out --batch or --stream.")
    if not options.wait and not options.batch:
        raise SettingsError("--no-wait is about batches: add --batch, or leave it out.")
    if options.ray is None or options.dry_run:
        return
    found = [name for name, unasked in _NOT_ON_RAY.items() if getattr(options, name) != unasked]
    if found:
        flags = ", ".join("--no-ledger" if name == "ledger" else f"--{name}" for name in found)
        raise SettingsError(
            f"--ray doesn't go with {flags}: expected only --teacher and --concurrency beside it. "
            "Leave those out, or start the parts yourself with --shard."
        )


def ask_teachers(options: argparse.Namespace, share: "Share | None" = None) -> "Generated":
    """`generation.generate` as the options say."""
    from distill_datasets.generation.batch_api import Patience
    from distill_datasets.generation.run import generate as ask

    batch = Patience(options.poll, options.wait) if getattr(options, "batch", False) else None
    return ask(
        **_asked(options),
        requests_per_minute=options.rpm,
        tokens_per_minute=options.tpm,
        meter=_meter(options, share.folder(options.out) if share else options.out),
        processes=options.processes,
        batch=batch,
        stream=getattr(options, "stream", False),
        share=share,
    )


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """What is asked, of whom and where to, which a run and its rehearsal have alike."""
    names = ("recipe", "teacher", "out", "concurrency", "limit", "ledger")
    return {name: getattr(options, name) for name in names}


def report_answers(made: "Generated") -> None:
    """Say what became of the rows; raises `GenerationError` where some are missing."""
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(made.rejected.items()))
    print(f"answers: {made.kept} kept" + (f", rejected: {rejected}" if rejected else ""))
    if first := made.first_token:
        late = f"95 % within {first['p95']:.2f} s"
        print(f"first token: {first['median']:.2f} s (median of {first['answers']:,}), {late}")
    if made.errors:
        raise _incomplete(made)


def _incomplete(made: "Generated") -> DistillError:
    from distill_datasets.errors import GenerationError
    from distill_datasets.schema import failure_text

    first = next(error for error in made.rows["error"] if error)
    return GenerationError(
        f"{made.errors} rows failed, the first with: {failure_text(first)}. Run the same command "
        "again: it asks only for those that may yet succeed."
    )


def _meter(options: argparse.Namespace, folder: Path) -> "Meter | None":
    from distill_datasets.generation.pricing import open_meter

    journal = folder / "journal.sqlite"
    return open_meter(options.prices, budget=options.budget, journal=journal)


def _rehearse(options: argparse.Namespace, share: "Share | None") -> None:
    from distill_datasets.generation.dry_run import rehearse

    found = rehearse(**_asked(options), prices=options.prices, sample=options.sample, share=share)
    print(found.text())


def _generate_on_ray(options: argparse.Namespace) -> None:
    from distill_datasets.generation.ray import generate_on_ray

    made = generate_on_ray(
        options.recipe,
        out=options.out,
        parts=options.ray,
        teacher=options.teacher,
        concurrency=options.concurrency,
    )
    print(f"answers: {made.rows} rows in {options.ray} parts, {made.errors} failed ({made.path})")


def synthesize(options: argparse.Namespace) -> None:
    """Let the teacher write queries."""
    from distill_datasets.generation.rate_limit import Limits
    from distill_datasets.synthesis.run import synthesize as write

    folder = options.out or Path(options.recipe)
    made = write(
        options.recipe,
        n=options.n,
        out=options.out,
        teacher=options.teacher,
        seed=options.seed,
        limits=Limits(options.concurrency, options.rpm, options.tpm),
        meter=_meter(options, folder / "synthesis"),
    )
    print(f"{made.sentence()} ({made.path})\n{made.table()}")
    for rule in made.uncovered_rules:
        print(f"no query exercises: {rule}")


def publish(options: argparse.Namespace) -> None:
    """Make a release of a run, and push it; or push a training's student."""
    first = options.run[0]
    if (first / "checkpoints.jsonl").is_file():
        _push_student(options, first)
        return
    runs = first if len(options.run) == 1 else options.run
    release = make_release(runs, out=options.out, version=options.version, ledger=options.ledger)
    if options.push_to_hub is None:
        return
    _confirm(options, f"{release.path}")
    pushed = release.push_to_hub(
        options.push_to_hub,
        config=options.config,
        version=options.version,
        private=options.private,
        create_pr=options.create_pr,
        allow=options.allow,
    )
    place = pushed.pull_request or f"{pushed.repo}@{pushed.tag} ({pushed.commit})"
    done = "pushed" if pushed.changed else "nothing to push: the Hub has"
    print(f"{done} {pushed.version}: {place}\n  {pushed.why}")


def make_release(run: Any, **how: Any) -> "Release":
    """`release.publish`, and a line about it."""
    from distill_datasets.releases.release import publish as write

    release = write(run, **how)
    splits = ", ".join(f"{rows} {split}" for split, rows in release.splits.items())
    print(f"release {release.version}: {splits}; {release.rejected} rejected ({release.path})")
    return release


def _push_student(options: argparse.Namespace, training: Path) -> None:
    from distill_datasets.errors import RepositoryError
    from distill_datasets.training.export import push_student

    if options.push_to_hub is None:
        raise RepositoryError(
            f"{str(training)!r} is a training: say where its student shall go with "
            "--push-to-hub me/student."
        )
    _confirm(options, f"the student of {training}")
    pushed = push_student(
        training,
        options.push_to_hub,
        private=options.private,
        base_model=options.base_model,
        allow=options.allow,
    )
    done = "pushed the student" if pushed.changed else "nothing to push: the student is there"
    print(f"{done}: {pushed.repo} ({pushed.commit})")


def _confirm(options: argparse.Namespace, what: str) -> None:
    """Ask a person before anything leaves the machine; a script has decided already."""
    if options.yes or not sys.stdin.isatty():
        return
    seen = "privately" if options.private else "for everybody"
    if input(f"Push {what} to {options.push_to_hub}, {seen}? [y/N] ").strip().lower() != "y":
        raise KeyboardInterrupt


def diff(options: argparse.Namespace) -> None:
    """Say what changed between two releases."""
    from distill_datasets.releases.diff import diff as compare

    found = compare(options.old, options.new, config=options.config)
    print(json.dumps(found.data, indent=2, ensure_ascii=False) if options.json else found.text())
