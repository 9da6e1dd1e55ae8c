"""How many requests at once a sampler is worth: more of them are no use to a server that queues."""

_FEWEST = 20  # replies that say something about a window
_TWICE = 2.0  # the quickest reply's time, which a queue exceeds
_NOTABLE = 0.25  # seconds of waiting that are worth finding out about
_LESS = 0.75
_KEPT = 0.9  # of the replies a second, where fewer requests lose nothing
_FEW = 32  # requests at once that may as well wait in line
# The number varies where it is the rate that is limited: fewer would hold back the rate too.
_SPARE = 1.15
_PATIENCE = (4, 64)  # windows between two trials, at first and at most


class Crowd:
    """A number of requests in flight: the cap at first, fewer where they only wait in line.

    When replies take long against the quickest, fewer at once are tried: if as many replies a
    second come as before, they had been waiting in line, and fewer it is; otherwise the number is
    restored, and the next trial comes later. A window is one round trip. Times are in seconds.
    """

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.size = float(cap)
        self._quickest = float("inf")
        self._before: tuple[float, float] | None = None  # size and replies a second
        self._step = 1.0
        self._settling = False
        self._patience = _PATIENCE[0]
        self._until_trial = _PATIENCE[0]
        self._first, self._began = 0, 0.0
        self._replies, self._seconds, self._full = 0, 0.0, False

    def refuse(self, in_flight: int) -> None:
        """So many were in flight when more were refused."""
        self.size = max(1.0, min(self.size, in_flight * _SPARE))
        self._before, self._step = None, 1.0

    def reply(self, number: int, seconds: float, in_flight: int, newest: int, now: float) -> None:
        """Count a reply to the start with this `number`, which took so long.

        `in_flight` counts those before it ended, and `newest` is the number of the latest start.
        """
        self._quickest = min(self._quickest, seconds)
        self._replies += 1
        self._seconds += seconds
        self._full = self._full or in_flight >= int(self.size)
        if number >= self._first and self._replies >= max(_FEWEST, int(self.size) // 2):
            self._judge(now)
            self._open(newest + 1, now)

    def _judge(self, now: float) -> None:
        rate = self._replies / max(now - self._began, 1e-9)
        took = self._seconds / self._replies
        waits = took > _TWICE * self._quickest and took - self._quickest > _NOTABLE
        if self._settling:
            self._settling = False  # what started before the trial has ended now
        elif self._before is not None:
            self._decide(rate)
        elif waits and self._full:
            self._try(rate)
        elif self._full and self.size < self.cap:
            self.size = min(self.cap, self.size + self._step)
            self._step = min(2 * self._step, self.size / 8)

    def _try(self, rate: float) -> None:
        self._until_trial -= 1
        if self._until_trial <= 0 and self.size > _FEW:
            self._before, self._step = (self.size, rate), 1.0
            self.size = max(_FEW, self.size * _LESS)
            self._settling = True

    def _decide(self, rate: float) -> None:
        assert self._before is not None
        size, before = self._before
        self._before = None
        if rate >= _KEPT * before:
            self._patience, self._until_trial = _PATIENCE[0], 1
            return
        self.size = size
        self._patience = min(2 * self._patience, _PATIENCE[1])
        self._until_trial = self._patience

    def _open(self, first: int, now: float) -> None:
        self._first, self._began = first, now
        self._replies, self._seconds, self._full = 0, 0.0, False
