"""An OpenAI-compatible proxy before a teacher with its prompt and a student without.

Applications keep their client and the name of their model. Each request goes to one of the two;
where that fails before anything was sent, the other answers. Of what the student answers, a share
is asked of the teacher too, behind the client's back.
"""

import asyncio
import hmac
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import aiohttp
from aiohttp import web
from aiohttp.http import HttpProcessingError
from markupsafe import Markup
from yarl import URL

from distill_datasets.conversations import to_text
from distill_datasets.errors import DatasetError, DistillError
from distill_datasets.generation.pricing import Price
from distill_datasets.models.sampler import digest
from distill_datasets.schema import Message
from distill_datasets.serving.protocol import (
    Exchange,
    Place,
    SpokenStream,
    as_events,
    messages_of,
    read_exchange,
    read_places,
    refused,
    with_prompt,
    without_prompt,
)
from distill_datasets.serving.rollout import (
    MOVES,
    Move,
    RolloutState,
    by_name,
    fraction,
    read_lines,
)
from distill_datasets.tables import html_facts, html_table

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge


Arm = Literal["teacher", "student"]
_LARGEST = 16 << 20  # bytes of a request, and of an answer
_SECONDS = 600.0
BROKEN, GONE = "broken", "gone"  # a stream that its model left, or its reader
_REMEMBERED = 10_000  # answers of the teacher, so that none is paid twice
_EVENTS = {"Content-Type": "text/event-stream"}
_REST = (0.5, 30.0)  # seconds
_MOST_SHADOWS = 256  # at once; more traffic than that is told enough by a part of it
# A status that says nothing of the request: the other model may answer it.
_ELSEWHERE = frozenset({401, 403, 404, 408, 409, 425, 429, *range(500, 600)})
_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_PAGE = Markup(
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="5">'
    '<meta name="viewport" content="width=device-width"><title>Rollout</title><style>'
    "body{{font:15px system-ui;margin:2rem auto;max-width:52rem;padding:0 1rem;color-scheme:light "
    "dark}}table{{border-collapse:collapse;width:100%}}td{{padding:.3rem .6rem;"
    "border-bottom:1px solid #8884}}h1{{font-size:1.3rem}}</style><h1>Rollout of {}</h1>{}"
    "<h1>Changes of stage ({})</h1>{}</html>"
)
_SHOWN_MOVES = 20


@dataclass(frozen=True)
class Backend:
    """Where a model answers; `price` is what it takes, where that is known."""

    url: URL
    model: str
    key: str | None = None
    price: Price | None = None


@dataclass(frozen=True)
class Chooser:
    """Whether the student is sure enough: `serves` is asked by a query and its answer's tokens.

    It wants to know the `likeliest` tokens of each place, and raises `DatasetError` where it can't
    tell. `blend` is the share of the users whose other queries go to the student with the prompt.
    """

    serves: Callable[[str, Sequence[Place]], bool]
    likeliest: int = 0
    blend: float = 0.0


class _Rest:
    """How long a model that failed is not asked first: twice as long after each failure.

    However long a server is away, it is one failure: it does not look like a student that fails
    often.
    """

    def __init__(self) -> None:
        self._until, self._pause = 0.0, 0.0

    @property
    def begun(self) -> bool:
        """Whether it has not answered since it failed."""
        return self._pause > 0

    @property
    def lasts(self) -> bool:
        """Whether it is not to be asked yet."""
        return time.monotonic() < self._until

    def begin(self) -> None:
        """Take a failure into account."""
        if not self.lasts:  # requests that were on their way together fail together
            self._pause = min(max(2 * self._pause, _REST[0]), _REST[1])
            self._until = time.monotonic() + self._pause

    def end(self) -> None:
        """Take an answer into account."""
        self._until = self._pause = 0.0


class BackendError(Exception):
    """A model did not answer, and another one may."""

    def __init__(self, arm: Arm, status: int, said: str) -> None:
        """`said` is what a client reads if nobody answers."""
        super().__init__(said)
        self.arm, self.status, self.said = arm, status, said


class RefusedError(Exception):
    """A model refuses a request for good, as the other would too."""

    def __init__(self, arm: Arm, status: int, body: bytes) -> None:
        """`body` is what the client reads."""
        super().__init__(body[:500].decode(errors="replace"))
        self.arm, self.status, self.body = arm, status, body


@dataclass(frozen=True)
class _Asked:
    """A request, its conversation without the prompt, and the body that each model gets of it."""

    request: web.Request
    body: Mapping[str, Any]
    messages: Sequence[Message]
    bodies: Mapping[Arm, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """The model's name as the client says it."""
        return str(self.body.get("model", ""))

    @property
    def key(self) -> str:
        """Whose it is: the user's name, or else the conversation's beginning."""
        user = self.body.get("user") or self.body.get("safety_identifier")
        if isinstance(user, str) and user:
            return f"user {user}"
        asked = [one["content"] for one in self.messages if one["role"] == "user"]
        return digest(asked[:1])


class RolloutProxy:
    """The application: `/v1/chat/completions`, `/v1/models`, `/metrics`, and a page at `/`."""

    def __init__(
        self,
        rollout: RolloutState,
        backends: Mapping[Arm, Backend],
        *,
        chooser: Chooser | None = None,
        budget: float | None = None,
        api_key: str | None = None,
        admin_key: str,
    ) -> None:
        """Opens its connections when the application starts."""
        self.rollout, self.backends, self.budget = rollout, backends, budget
        self.chooser = chooser
        self._rests: dict[Arm, _Rest] = {"teacher": _Rest(), "student": _Rest()}
        self._said_failed: set[tuple[Arm, int]] = set()
        self._api_key, self._admin_key = api_key, admin_key
        self.monitor = Monitor(rollout)
        self._known: OrderedDict[str, asyncio.Future[Exchange]] = OrderedDict()
        self._shadows: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    def app(self) -> web.Application:
        """The application, for one event loop."""
        app = web.Application(client_max_size=_LARGEST)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self.monitor.metrics)
        app.router.add_get("/", self.monitor.page)
        app.router.add_post("/rollout/stage", self._move)
        app.cleanup_ctx.append(self._connected)
        return app

    async def _connected(self, _: web.Application) -> Any:
        connector = aiohttp.TCPConnector(limit=0)
        jar = aiohttp.DummyCookieJar()
        # A line of a stream may be as long as half an answer: with log-probabilities it is.
        known: dict[str, Any] = {"connector": connector, "read_bufsize": _LARGEST // 2}
        async with aiohttp.ClientSession(cookie_jar=jar, **known) as session:
            self._session = session
            yield
            await self.settle()
        self.rollout.save()

    async def settle(self) -> None:
        """Wait until nothing is shadowed any more."""
        while self._shadows:
            await asyncio.gather(*self._shadows, return_exceptions=True)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if refusal := _locked_out(request, self._api_key):
            return refusal
        try:
            asked = self._read(request, json.loads(await request.read()))
        except web.HTTPRequestEntityTooLarge:
            return refused(413, f"expected at most {_LARGEST} bytes in a request; found more")
        except (ValueError, RecursionError) as error:  # ours that say what a request lacks are too
            return refused(400, f"the request can't be read: {error}")
        try:
            return await self._reply(asked)
        except RefusedError as error:
            self.monitor.requests.labels(error.arm, error.status).inc()
            return web.Response(
                status=error.status, body=error.body, content_type="application/json"
            )

    def _read(self, request: web.Request, body: Any) -> _Asked:
        """A request for both: the teacher's with the prompt, the student's without.

        Raises `ValueError` that says what it lacks.
        """
        recipe = self.rollout.judgement.recipe
        bare = without_prompt(recipe, messages_of(body))
        top, tools = body.get("top_logprobs") or 0, body.get("tools")
        if not isinstance(top, int) or top < 0:
            raise ValueError(f"expected top_logprobs as a whole number from 0; found {top!r:.80}")
        shown, known = with_prompt(recipe, bare, json.dumps(tools) if tools else None)
        own = recipe.student_prompt
        said: dict[Arm, dict[str, Any]] = {
            "student": {"messages": [{"role": "system", "content": own}, *bare] if own else bare},
            "teacher": {"messages": shown, **({"tools": json.loads(known)} if known else {})},
        }
        bodies: dict[Arm, Mapping[str, Any]] = {
            arm: {**body, **said[arm], "model": one.model} for arm, one in self.backends.items()
        }
        return _Asked(request, body, bare, bodies)

    async def _reply(self, asked: _Asked) -> web.StreamResponse:
        """The answer of the model whose turn it is, or of the other one where that fails."""
        failed: list[BackendError] = []
        order: list[Arm] = ["student", "teacher"]
        if not self.rollout.takes(asked.key):
            order.reverse()
        if self._rests[order[0]].lasts and not self._rests[order[1]].lasts:
            order.reverse()
        for arm in order:
            began = time.perf_counter()
            try:
                if arm == "student" and self.chooser is not None:
                    response, said, arm = await self._choose(asked, self.chooser)
                else:
                    response, said = await self._answer(asked, arm, asked.bodies[arm])
            except BackendError as error:
                failed.append(error)
                self._count_failed(error, other=len(failed) == 1)
                continue
            self.monitor.count_answer(arm, time.perf_counter() - began, said)
            if arm == "student" and said.stop_reason == BROKEN:
                self.rollout.count_failed()
            elif arm == "student" and said.stop_reason != GONE:
                self.rollout.count_answer(asked.messages, said)
                self._shadow(asked, said)
            return response
        return refused(failed[0].status, failed[0].said, kind="server_error")

    def _count_failed(self, error: BackendError, *, other: bool) -> None:
        counts = not self._rests[error.arm].begun
        self._rests[error.arm].begin()
        self.monitor.requests.labels(error.arm, error.status).inc()
        if other:
            self.monitor.failovers.labels(error.arm).inc()
        self._say_failed(error)
        if error.arm == "student" and counts:
            self.rollout.count_failed()

    def _say_failed(self, error: "BackendError | RefusedError") -> None:
        """Each kind of failure once, and nothing of what was said, which may hold texts."""
        if (kind := (error.arm, error.status)) in self._said_failed:
            return
        self._said_failed.add(kind)
        hint = f": check {error.arm.upper()}_API_KEY" if error.status in (401, 403) else ""
        url = self.backends[error.arm].url
        print(
            f"rollout: the {error.arm} at {url} failed ({error.status}){hint}; /metrics counts "
            "more of these",
            file=sys.stderr,
        )

    async def _choose(
        self, asked: _Asked, chooser: Chooser
    ) -> tuple[web.StreamResponse, Exchange, Arm]:
        """The student's answer where it is sure enough; else the teacher's, or for a share of such
        queries the student's with the prompt.
        """
        wanted = max(chooser.likeliest, asked.body.get("top_logprobs") or 0)
        told = {"logprobs": True, **({"top_logprobs": wanted} if wanted else {})}
        answer, said = await self._fetch("student", {**_whole(asked.bodies["student"]), **told})
        try:
            query, choices = to_text(asked.messages), answer["choices"]
            serves = all(chooser.serves(query, read_places(one)) for one in choices)
        except DatasetError as error:
            raise BackendError("student", 502, f"student: {error}") from error
        self._rests["student"].end()
        if serves:
            return await self._give(asked, answer), said, "student"
        self.rollout.keep_query(asked.messages, "low confidence")
        self.monitor.unsure.inc()
        # With the prompt the student is another system: no answer of that is evidence.
        blends = fraction(f"blend {asked.key}") < chooser.blend
        arm: Arm = "student" if blends else "teacher"
        body = {**asked.bodies["teacher"], "model": self.backends[arm].model}
        self.monitor.blended.inc(float(blends))
        try:
            return (*await self._answer(asked, arm, body), "teacher")
        except BackendError as error:
            # An answer of little confidence is better than none.
            self._count_failed(error, other=True)
            return await self._give(asked, answer), said, "student"

    async def _give(self, asked: _Asked, answer: dict[str, Any]) -> web.StreamResponse:
        """A whole answer that was held back, in the form that was asked for."""
        for choice in answer["choices"]:
            if not asked.body.get("logprobs"):
                choice.pop("logprobs", None)
            elif self.chooser is not None and self.chooser.likeliest:
                for place in choice["logprobs"]["content"]:
                    del place["top_logprobs"][asked.body.get("top_logprobs") or 0 :]
        answer["model"] = asked.name or answer.get("model")
        if not asked.body.get("stream"):
            return web.json_response(answer)
        response = web.StreamResponse(headers=_EVENTS)
        await response.prepare(asked.request)
        options = asked.body.get("stream_options")
        counts = isinstance(options, Mapping) and bool(options.get("include_usage"))
        for event in as_events(answer, counts=counts):
            await response.write(event)
        return response

    async def _answer(
        self, asked: _Asked, arm: Arm, body: Mapping[str, Any]
    ) -> tuple[web.StreamResponse, Exchange]:
        """One model's answer, on its way to the client; raises before anything was sent."""
        response: web.StreamResponse
        if body.get("stream"):
            response, said = await self._pass_on(asked, arm, body)
        else:
            answer, said = await self._fetch(arm, body)
            response = web.json_response({**answer, "model": asked.name or answer.get("model")})
        self._rests[arm].end()
        return response, said

    async def _pass_on(
        self, asked: _Asked, arm: Arm, body: Mapping[str, Any]
    ) -> tuple[web.StreamResponse, Exchange]:
        """A stream as it comes; one that breaks off breaks off for the client too."""
        began, stream = web.StreamResponse(headers=_EVENTS), SpokenStream(asked.name)
        try:
            async with self._post(arm, body) as upstream:
                if upstream.status != 200:
                    await _read_whole(upstream, arm)
                async for line in upstream.content:
                    if not began.prepared:
                        await began.prepare(asked.request)
                    await began.write(stream.passed(line))
        except (aiohttp.ClientError, HttpProcessingError, TimeoutError, OSError) as error:
            if not began.prepared:
                raise BackendError(arm, 502, f"{arm}: {type(error).__name__}: {error}") from error
            if asked.request.transport is not None:
                asked.request.transport.abort()
            gone = isinstance(error, ConnectionResetError)  # raised where the client is written to
            return began, Exchange("", GONE if gone else BROKEN)
        if not began.prepared:
            raise BackendError(arm, 502, f"{arm}: an empty stream")
        return began, stream.exchange if stream.done else Exchange("", BROKEN)

    async def _fetch(self, arm: Arm, body: Mapping[str, Any]) -> tuple[dict[str, Any], Exchange]:
        """A whole answer, and what it says."""
        try:
            async with self._post(arm, body) as upstream:
                return await _read_whole(upstream, arm)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise BackendError(arm, 502, f"{arm}: {type(error).__name__}: {error}") from error

    def _post(self, arm: Arm, body: Mapping[str, Any]) -> Any:
        assert self._session is not None
        backend = self.backends[arm]
        return self._session.post(
            backend.url / "chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {backend.key}"} if backend.key else None,
            timeout=aiohttp.ClientTimeout(total=_SECONDS, sock_connect=5),
            allow_redirects=False,
        )

    def _shadow(self, asked: _Asked, said: Exchange) -> None:
        """Have the teacher answer too, later, if it is this one's turn and there is money left."""
        wanted = self.rollout.shadows(digest([asked.key, to_text(asked.messages)]))
        affordable = self.budget is None or self.rollout.spent < self.budget
        if wanted and affordable and len(self._shadows) < _MOST_SHADOWS:
            task = asyncio.create_task(self._compare(asked, said, self.rollout.stage.name))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)

    async def _compare(self, asked: _Asked, said: Exchange, stage: str) -> None:
        """Score the student's answer by the teacher's; one of an earlier stage is no evidence."""
        try:
            theirs = await self._teacher_says({**_whole(asked.bodies["teacher"]), "n": 1})
        except (BackendError, RefusedError) as error:
            self.monitor.shadowed.labels(f"failed {error.status}").inc()
            self._say_failed(error)
            return
        if self.rollout.stage.name == stage:
            score = self.rollout.count_shadowed(asked.messages, said, theirs)
            self.monitor.shadowed.labels("agrees" if score == 1 else "differs").inc()

    async def _teacher_says(self, body: Mapping[str, Any]) -> Exchange:
        """The teacher's answer; the same request is paid once, also while it is on its way."""
        name = digest(body)
        if name not in self._known:
            self._known[name] = asyncio.ensure_future(self._ask_teacher(body))
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        try:
            return await asyncio.shield(self._known[name])
        except (BackendError, RefusedError):
            self._known.pop(name, None)
            raise

    async def _ask_teacher(self, body: Mapping[str, Any]) -> Exchange:
        _, said = await self._fetch("teacher", body)
        if (price := self.backends["teacher"].price) is not None:
            counts = (said.prompt_tokens, said.cached_tokens, said.response_tokens)
            self.rollout.spent += price.of(*counts)
        return said

    async def _models(self, request: web.Request) -> web.Response:
        if refusal := _locked_out(request, self._api_key):
            return refusal
        names = [backend.model for backend in self.backends.values()]
        listed = [{"id": one, "object": "model", "owned_by": "rollout"} for one in names]
        return web.json_response({"object": "list", "data": listed})

    async def _move(self, request: web.Request) -> web.Response:
        if refusal := _locked_out(request, self._admin_key):
            return refusal
        try:
            target = by_name(str((await request.json())["to"]), self.rollout.stages)
        except (DistillError, ValueError, KeyError, TypeError) as error:
            return refused(400, f"expected {{'to': STAGE}}: {error}")
        evidence = self.rollout.evidence
        interval = {"interval": evidence.interval, "shadowed": evidence.shadowed}
        self.rollout.move(Move(target.name, "by hand", interval))
        return web.json_response({"stage": target.name})


def _locked_out(request: web.Request, key: str | None) -> web.Response | None:
    found = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if key is None or hmac.compare_digest(found.encode("utf-8", "surrogateescape"), key.encode()):
        return None
    return refused(401, "expected this proxy's key as 'Authorization: Bearer <key>'")


def _whole(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same request for an answer that is no stream."""
    return {key: value for key, value in body.items() if not key.startswith("stream")}


async def _read_whole(
    upstream: aiohttp.ClientResponse, arm: Arm
) -> tuple[dict[str, Any], Exchange]:
    """Raises `BackendError` for what another model may answer, and for an answer that is none."""
    text = bytearray()
    async for piece in upstream.content.iter_chunked(1 << 16):
        text += piece
        if len(text) > _LARGEST:
            raise BackendError(arm, 502, f"an answer of more than {_LARGEST >> 20} MiB")
    if upstream.status in _ELSEWHERE:
        raise BackendError(arm, upstream.status, text[:500].decode(errors="replace"))
    if upstream.status != 200:
        raise RefusedError(arm, upstream.status, bytes(text))
    try:
        answer = json.loads(text)
        return dict(answer), read_exchange(answer)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise BackendError(arm, 502, f"an answer that can't be read: {error!r}") from error


class Monitor:
    """Counts by model; a registry of its own, so that nothing else of the process is told."""

    def __init__(self, rollout: RolloutState) -> None:
        """Needs `prometheus-client`."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.rollout, self.registry = rollout, CollectorRegistry()

        def counter(name: str, meaning: str, *labels: str) -> "Counter":
            return Counter(f"rollout_{name}", meaning, labels, registry=self.registry)

        def gauge(name: str, meaning: str) -> "Gauge":
            return Gauge(f"rollout_{name}", meaning, registry=self.registry)

        self.requests = counter("requests", "Answers and failures of a model", "model", "status")
        self.failovers = counter("failovers", "Requests that the other model got", "from")
        self.tokens = counter("tokens", "Tokens as the servers count them", "model", "kind")
        self.shadowed = counter("shadowed", "Answers that the teacher gave too", "outcome")
        self.unsure = counter("unsure", "Answers of the student that it was not sure of")
        self.blended = counter("blended", "Of these, queries to the student with the prompt")
        self.latency: Histogram = Histogram(
            "rollout_seconds",
            "Time to the end of an answer",
            ["model"],
            registry=self.registry,
            buckets=_BUCKETS,
        )
        agreement = "Agreement with the teacher in this stage, 95 %"
        self.gauges = {
            "share": gauge("share", "Share of the traffic that the student gets"),
            "low": gauge("agreement_low", agreement),
            "high": gauge("agreement_high", agreement),
            "labels": gauge("labels_apart", "Total variation of answers from held-out rows'"),
            "length": gauge("length_ratio", "Length of answers, by that on held-out rows"),
            "spent": gauge("spent", "What shadowing cost, in the currency of the prices"),
        }

    def count_answer(self, arm: str, seconds: float, said: Exchange) -> None:
        """Take an answer into account."""
        self.requests.labels(arm, 200).inc()
        self.latency.labels(arm).observe(seconds)
        self.tokens.labels(arm, "prompt").inc(said.prompt_tokens)
        self.tokens.labels(arm, "response").inc(said.response_tokens)

    async def metrics(self, _: web.Request) -> web.Response:
        """All numbers in Prometheus' text format."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        usual, (low, high) = self.rollout.judgement.usual, self.rollout.evidence.interval
        labels = usual.labels[0] if usual.labels else 0.0
        found = {"low": low, "high": high, "labels": labels, "length": usual.length_ratio or 0.0}
        found |= {"share": self.rollout.stage.share, "spent": self.rollout.spent}
        for name, value in found.items():
            self.gauges[name].set(value)
        headers = {"Content-Type": CONTENT_TYPE_LATEST}
        return web.Response(body=generate_latest(self.registry), headers=headers)

    async def page(self, _: web.Request) -> web.Response:
        """The stage, its evidence, and the changes of stage, on one page."""
        stage, found, rules = self.rollout.stage, self.rollout.evidence, self.rollout.rules
        (low, high), usual = found.interval, self.rollout.judgement.usual
        labels, ratio = usual.labels, usual.length_ratio
        odd = ", ".join(f"{name} {count:,}" for name, count in sorted(found.odd.items()))
        facts = {
            "stage": f"{stage.name}: {stage.share:.0%} of the traffic, {stage.shadow:.0%} shadowed",
            "agreement with the teacher": f"{low:.3f} to {high:.3f} by {found.shadowed:,} answers "
            f"(at least {rules.least:.3f}; held-out rows had {rules.expected:.3f})",
            "answers of the student": f"{found.answers:,} of {found.requests:,} requests",
            "odd answers": odd or "none",
            "labels, against held-out rows": None
            if labels is None
            else f"{labels[0]:.3f} of the shares lie elsewhere; chance alone makes about "
            f"{labels[1]:.3f}",
            "length, against held-out rows": None if ratio is None else f"{ratio:.2f} times",
            "spent on shadowing": f"{self.rollout.spent:.4f}",
        }
        moves = reversed(read_lines(self.rollout.folder / MOVES)[-_SHOWN_MOVES:])
        lines = [(one["at"], f"{one['from']} → {one['to']}", one["why"]) for one in moves]
        page = _PAGE.format(self.rollout.folder.parent, html_facts(facts), MOVES, html_table(lines))
        return web.Response(text=page, content_type="text/html")
