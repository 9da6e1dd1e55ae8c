"""Starts a rollout's proxy, and tells a running one to change its stage."""

import asyncio
import os
import secrets
import signal
import sys
from pathlib import Path

from aiohttp import web

from distill_datasets.errors import (
    DatasetError,
    ModelError,
    OutputError,
    ServiceError,
    SettingsError,
)
from distill_datasets.files import one_writer, read_report, write_file
from distill_datasets.generation.pricing import Prices
from distill_datasets.models.endpoint import read_address, read_key
from distill_datasets.recipes.prompt import fields_of
from distill_datasets.recipes.recipe import Recipe
from distill_datasets.serving.proxy import Arm, Backend, Chooser, RolloutProxy
from distill_datasets.serving.rollout import (
    Move,
    RolloutState,
    by_name,
)
from distill_datasets.serving.settings import RolloutSettings

_ADMIN = "admin.txt"  # the address of a running proxy, and the key that moves it
_WORSE = 0.1  # by which agreement falls, in what is promised of a worse student


def rollout(run: Path | str, settings: RolloutSettings | None = None) -> None:
    """Answer for both models until Ctrl-C; goes on where an earlier rollout of this run stood.

    Raises `DatasetError` for a run without release or report, `ModelError` where no address of a
    model is known, `SettingsError` and `ServiceError`.
    """
    try:
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "A rollout counts with prometheus-client: pip install 'distill-datasets[serve]'."
        ) from error
    settings, folder, admin = settings or RolloutSettings(), Path(run), secrets.token_urlsafe(24)
    state = RolloutState.of(folder, settings)
    recipe = state.judgement.recipe
    proxy = RolloutProxy(
        state,
        backends_of(folder, recipe, settings),
        chooser=_chooser(folder, recipe, settings),
        budget=settings.budget,
        api_key=settings.api_key,
        admin_key=admin,
    )
    with one_writer(state.folder, "rollout"):
        asyncio.run(_serve(proxy, admin, settings))


def move(run: Path | str, to: str, settings: RolloutSettings | None = None) -> str:
    """Change the stage of a rollout, whether its proxy runs or not; says what was done.

    Raises `SettingsError` for a stage that it does not have, `ServiceError` where a running proxy
    refuses.
    """
    import httpx

    state = RolloutState.of(Path(run), settings or RolloutSettings())
    by_name(to, state.stages)
    try:
        with one_writer(state.folder, "rollout"):
            state.move(Move(to, "by hand", {}))
            return f"{run} is at stage {to}; no proxy runs."
    except OutputError:
        pass  # a proxy runs
    try:
        url, key = (state.folder / _ADMIN).read_text(encoding="utf-8").split()
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/rollout/stage", json={"to": to}, headers=headers, timeout=10)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise ServiceError(
            f"The rollout in {str(state.folder)!r} can't be reached: {error}. Stop its proxy, and "
            "name the stage as it starts."
        ) from error
    if answer.status_code != 200:
        raise ServiceError(f"The proxy of {str(state.folder)!r} refuses: {answer.text[:300]}")
    return f"The proxy at {url} is at stage {to}."


def _chooser(run: Path, recipe: Recipe, settings: RolloutSettings) -> Chooser | None:
    if settings.epsilon is None:
        return None
    # Late, for what it imports fills hundreds of MiB, and a proxy runs for months.
    from distill_datasets.serving.calibration import Confidence, Thresholds

    found = Thresholds.read(run)
    if found.report != read_report(run).get("digest"):
        raise DatasetError(
            f"{str(found.path)!r} is of another report, whose student may be another: run "
            f"`distill-datasets calibrate {run} --epsilon {settings.epsilon:g}` again."
        )
    point = next((one for one in found.points if one.epsilon == settings.epsilon), None)
    if point is None:
        raise SettingsError(
            f"The run was calibrated for {', '.join(f'{one.epsilon:g}' for one in found.points)}, "
            f"not {settings.epsilon:g}: run `distill-datasets calibrate {run} --epsilon "
            f"{settings.epsilon:g}`."
        )
    if not point.served:
        raise SettingsError(
            f"calibrate found no answers that keep to epsilon {settings.epsilon:g}: name a larger "
            "one, or calibrate on more rows."
        )
    known = Confidence(recipe, found.score)
    return Chooser(
        lambda query, places: point.serves(known.of(query, places)), known.likeliest, settings.blend
    )


def backends_of(run: Path, recipe: Recipe, settings: RolloutSettings) -> dict[Arm, Backend]:
    """Where both models answer, under which names and by which keys; raises `ModelError`."""
    prices = Prices.load(settings.prices) if settings.prices else None
    own, shared = os.environ.get("STUDENT_API_KEY"), os.environ.get("DISTILL_API_KEY")
    url, key = settings.student_url, read_key(own or shared, "STUDENT_API_KEY")
    name = settings.student_model or run.resolve().name
    student = Backend(read_address(url, "--student-url"), name, key)
    reference = recipe.all_teachers[0].model
    if len(recipe.all_teachers) > 1 and not settings.teacher_model:
        raise ModelError(
            f"The release has several teachers ({recipe.teacher_name}): name the one that answers "
            "beside the student with --teacher-model and --teacher-url."
        )
    hosted = reference.startswith("openai:")
    if hosted:
        url = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        key = read_key(os.environ.get("OPENAI_API_KEY"), "OPENAI_API_KEY")
    elif reference.startswith("tinker:") and not settings.teacher_url:
        raise ModelError(
            f"{reference!r} has no OpenAI-compatible address: name one with --teacher-url."
        )
    model = settings.teacher_model or reference.partition(":")[2] or reference
    priced = prices.of(reference) if prices else None
    address = read_address(settings.teacher_url or url, "--teacher-url")
    if not hosted and address != student.url:  # the student's key is for its own server alone
        key = None if reference.startswith("tinker:") else read_key(shared, "DISTILL_API_KEY")
    key = read_key(os.environ.get("TEACHER_API_KEY"), "TEACHER_API_KEY") or key
    return {"student": student, "teacher": Backend(address, model, key, priced)}


async def _serve(proxy: RolloutProxy, admin: str, settings: RolloutSettings) -> None:
    runner = web.AppRunner(proxy.app(), access_log=None, shutdown_timeout=10)
    await runner.setup()
    try:
        site = web.TCPSite(runner, settings.host, settings.port)
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise ServiceError(
            f"Can't listen at {settings.host}:{settings.port}: {error}. Choose another --port."
        ) from error
    url = f"http://{settings.host}:{runner.addresses[0][1]}"
    file = proxy.rollout.folder / _ADMIN
    write_file(file, "")
    file.chmod(0o600)
    with file.open("w", encoding="utf-8") as written:
        written.write(f"{url} {admin}\n")
    print(_promise(proxy.rollout, url), file=sys.stderr)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, ended.set)
    try:
        await ended.wait()
    finally:
        await runner.cleanup()  # which saves the state


def _promise(controlled: RolloutState, url: str) -> str:
    """What a user reads as the proxy starts: where it is, and what it promises."""
    rules, stage = controlled.rules, controlled.stage
    up, down = rules.promised(max(0.0, rules.least - _WORSE))
    lines = [
        f"The rollout answers at {url}/v1, numbers are at {url}/metrics and a page at {url}/.",
        f"Stage {stage.name}: the student answers {stage.share:.0%} of the users, and of that the "
        f"teacher {stage.shadow:.0%} too."
        if stage.share
        else f"Stage {stage.name}: the teacher answers everybody; --to names another stage.",
        f"Held-out rows agree in {rules.expected:.3f}; {rules.least:.3f} is the least. A student "
        f"as good is promoted after about {up or 'a million and more'} shadowed answers, one that "
        f"agrees in {max(0.0, rules.least - _WORSE):.3f} is taken off after about {down}.",
    ]
    if "text" not in fields_of(controlled.judgement.recipe.response):
        form = controlled.judgement.recipe.response
        lines.append(
            f"The student answers as {form!r} and the teacher in its own words: the application "
            "must read both."
        )
    return "\n".join(lines)
