"""What a rollout shows: numbers for Prometheus, and a page that refreshes itself."""

from html import escape
from typing import TYPE_CHECKING

from distill_datasets.serving.rollout import MOVES, Exchange, RolloutState, read_moves

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge

_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_STYLE = (
    "body{font:15px system-ui;margin:2rem auto;max-width:52rem;padding:0 1rem;color-scheme:light "
    "dark}table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3rem .6rem;"
    "border-bottom:1px solid #8884}h1{font-size:1.3rem}"
)
_SHOWN_MOVES = 20


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
        self.share = gauge("share", "Share of the traffic that the student gets")
        self.agreement = {
            end: gauge(f"agreement_{end}", "Agreement with the teacher in this stage, 95 %")
            for end in ("low", "high")
        }
        self.labels = gauge("labels_apart", "Total variation of answers from held-out rows'")
        self.length = gauge("length_ratio", "Length of answers, by that on held-out rows")
        self.spent = gauge("spent", "What shadowing cost, in the currency of the prices")

    def count_answer(self, arm: str, seconds: float, said: Exchange) -> None:
        """Take an answer into account."""
        self.requests.labels(arm, 200).inc()
        self.latency.labels(arm).observe(seconds)
        self.tokens.labels(arm, "prompt").inc(said.prompt_tokens)
        self.tokens.labels(arm, "response").inc(said.response_tokens)

    @property
    def headers(self) -> dict[str, str]:
        """The content type of `metrics`."""
        from prometheus_client import CONTENT_TYPE_LATEST

        return {"Content-Type": CONTENT_TYPE_LATEST}

    def metrics(self) -> bytes:
        """All numbers in Prometheus' text format."""
        from prometheus_client import generate_latest

        self.share.set(self.rollout.stage.share)
        for end, value in zip(("low", "high"), self.rollout.evidence.interval, strict=True):
            self.agreement[end].set(value)
        usual = self.rollout.judgement.usual
        self.labels.set(usual.labels[0] if usual.labels else 0.0)
        self.length.set(usual.length_ratio or 0.0)
        self.spent.set(self.rollout.spent)
        return generate_latest(self.registry)

    def page(self) -> str:
        """The stage, its evidence, and the changes of stage, on one page."""
        stage, found = self.rollout.stage, self.rollout.evidence
        low, high = found.interval
        rules = self.rollout.rules
        odd = ", ".join(f"{name} {count:,}" for name, count in sorted(found.odd.items()))
        facts = {
            "stage": f"{stage.name}: {stage.share:.0%} of the traffic, {stage.shadow:.0%} shadowed",
            "agreement with the teacher": f"{low:.3f} to {high:.3f} by {found.shadowed:,} answers "
            f"(at least {rules.least:.3f}; held-out rows had {rules.expected:.3f})",
            "answers of the student": f"{found.answers:,} of {found.requests:,} requests",
            "odd answers": odd or "none",
            **self._drift(),
            "spent on shadowing": f"{self.rollout.spent:.4f}",
        }
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>"
            for name, text in facts.items()
        )
        moves = "".join(
            f"<tr><td>{escape(one['at'])}</td><td>{escape(one['from'])} → {escape(one['to'])}</td>"
            f"<td>{escape(one['why'])}</td></tr>"
            for one in reversed(read_moves(self.rollout.folder)[-_SHOWN_MOVES:])
        )
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" '
            'content="5"><meta name="viewport" content="width=device-width"><title>Rollout</title>'
            f"<style>{_STYLE}</style><h1>Rollout of {escape(str(self.rollout.folder.parent))}</h1>"
            f"<table>{rows}</table><h1>Changes of stage ({MOVES})</h1><table>{moves}</table></html>"
        )

    def _drift(self) -> dict[str, str]:
        usual, found = self.rollout.judgement.usual, {}
        if usual.labels:
            apart, chance = usual.labels
            said = f"{apart:.3f} of the shares lie elsewhere; chance alone makes about {chance:.3f}"
            found["labels, against held-out rows"] = said
        if usual.length_ratio:
            found["length, against held-out rows"] = f"{usual.length_ratio:.2f} times"
        return found
