"""Which waiting samples join a running batch, and when: no model needed."""

from __future__ import annotations

import numpy as np

from distill_datasets.embedded.model import TokenBytes
from distill_datasets.embedded.scheduler import (
    SHORTEST,
    Admission,
    Newcomer,
    OpenRequest,
    Pace,
    Prefixes,
    Room,
    SampleJob,
    slot_width,
)
from distill_datasets.embedded.wire import DrawnSample, PromptScoring, SampleRequest

LONGEST = 512
PROMPT = list(range(100, 200))


def waiting(prompt: list[int], samples: int = 1, limit: int = 8) -> OpenRequest:
    request = SampleRequest(
        np.array(prompt), samples, limit, 0.0, -1, 1.0, 0, (), 0, PromptScoring()
    )
    return OpenRequest(SampleJob("base", request, lambda _: None), limit)


def admission(*requests: OpenRequest) -> Admission:
    made = Admission("base", Prefixes(), LONGEST)
    made.waiting.extend(requests)
    return made


def room(rows: int = 64, requests: int = 64, reading: int = LONGEST, holding: int = 10**6) -> Room:
    return Room(rows, requests, reading, holding, TokenBytes(kept=1, computed=0, learned=0))


def picked(one: Admission, where: Room | None = None) -> list[Newcomer]:
    return list(one.pick(where or room()))


def built(one: Admission) -> None:
    """Compute the prefix that it asks for, without a model."""
    part = np.zeros((1, 1000, 1, 1), np.float32)
    one.built([(part, part)])  # type: ignore[list-item]


def test_requests_join_in_the_order_they_came_while_there_is_room() -> None:
    requests = [waiting([n, n, n]) for n in range(5)]
    one = admission(*requests)
    assert [new.request for new in picked(one, room(rows=2))] == requests[:2]
    assert [new.request for new in picked(one, room(requests=1))] == requests[2:3]
    assert [new.request for new in picked(one, room(reading=3))] == requests[3:4]
    assert [new.request for new in picked(one)] == requests[4:]
    assert not one.waiting


def test_a_prompt_longer_than_what_is_left_to_read_waits_unless_it_is_first() -> None:
    first, second = waiting([1] * 20), waiting([2] * 20)
    one = admission(first, second)
    assert [new.request for new in picked(one, room(reading=5))] == [first]
    assert [new.request for new in picked(one, room(reading=5))] == [second]


def test_nobody_joins_for_whom_there_is_no_memory() -> None:
    one = admission(waiting([1] * 50, limit=60))
    assert not picked(one, room(holding=127))
    assert [new.reserved for new in picked(one, room(holding=128))] == [128]


def test_a_row_that_outgrows_its_first_slots_has_place_for_both_while_it_moves() -> None:
    one = admission(waiting([1] * 50, limit=400))
    assert not picked(one, room(holding=767))
    assert [new.reserved for new in picked(one, room(holding=768))] == [512 + 256]


def test_a_prefix_is_begun_where_there_is_memory_for_it() -> None:
    one = admission(*(waiting([*PROMPT, n]) for n in range(2)))
    assert not picked(one, room(holding=99))
    assert one.build is None
    assert not picked(one, room(holding=100))
    assert one.build is not None


def test_samples_of_a_request_join_as_rows_get_free() -> None:
    one = admission(waiting([1, 2], samples=5))
    assert [new.index for new in picked(one, room(rows=3))] == [0, 1, 2]
    assert [new.index for new in picked(one, room(rows=3))] == [3, 4]


def test_prompts_that_share_a_beginning_wait_until_it_is_computed_once() -> None:
    one = admission(*(waiting([*PROMPT, n, n]) for n in range(4)), waiting([7, 8]))
    assert [new.request.request.prompt.tolist() for new in picked(one)] == [[7, 8]]
    assert one.build is not None
    assert one.build.tokens.tolist() == PROMPT
    built(one)
    joined = picked(one)
    assert [(new.shared, new.suffix.tolist()) for new in joined] == [
        (100, [n, n]) for n in range(4)
    ]
    assert len({new.kind for new in joined}) == 1


def test_each_of_two_shared_beginnings_has_a_prefix_of_its_own() -> None:
    other = list(range(300, 380))
    one = admission(*(waiting([*start, n]) for n in range(3) for start in (PROMPT, other)))
    picked(one)
    built(one)
    first = picked(one)
    assert [new.shared for new in first] == [100] * 3
    built(one)
    assert [new.shared for new in picked(one)] == [80] * 3


def test_a_longer_beginning_starts_from_the_cached_part_of_it() -> None:
    one = admission(waiting([*PROMPT, 1]), waiting([*PROMPT, 2]))
    picked(one)
    built(one)
    picked(one)
    longer = [*PROMPT, *range(400, 700)]
    one.waiting.extend([waiting([*longer, 1]), waiting([*longer, 2])])
    picked(one)
    assert one.build is not None
    assert (len(one.build.tokens), one.build.done) == (400, 100)


def test_prompts_that_share_a_little_more_use_as_much_as_the_others() -> None:
    """A batch attends once to what all of it shares, rather than to many lengths of it."""
    prompts = [[*PROMPT, 1, 1, 1, 5], [*PROMPT, 1, 1, 1, 6], [*PROMPT, 2], [*PROMPT, 1, 3]]
    one = admission(*map(waiting, prompts))
    picked(one)
    built(one)
    assert [new.shared for new in picked(one)] == [100] * 4


def test_a_prompt_longer_than_a_pass_is_read_in_parts() -> None:
    one = admission(waiting(list(range(1000))))
    assert not picked(one)
    assert one.build is not None
    assert len(one.build.tokens) == 999


def test_a_waiting_prompt_is_not_taken_for_its_own_repetition() -> None:
    prefixes, prompt = Prefixes(), np.arange(100)
    assert [prefixes.repeated("base", prompt, []) for _ in range(2)] == [0, 0]
    assert prefixes.repeated("base", np.arange(SHORTEST + 5), []) == SHORTEST + 5


def test_a_request_that_failed_leaves_its_place_and_its_prefix() -> None:
    requests = [waiting([*PROMPT, n]) for n in range(2)]
    one = admission(*requests)
    picked(one)
    assert one.build is not None
    one.drop(one.build.owner)
    assert one.build is None
    assert list(one.waiting) == requests[1:]


def test_slots_are_as_wide_as_a_power_of_two() -> None:
    assert [slot_width(n) for n in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 256]


def test_others_join_as_long_as_the_first_request_keeps_its_pace() -> None:
    first = waiting([1])
    pace = Pace(first)
    assert pace.requests() == 1
    first.joined = 1
    pace.stepped(5.0, 1)
    assert pace.requests() == 0, "how long it takes alone isn't known yet"
    pace.stepped(1.0, 0)
    assert pace.requests() == 1
    pace.stepped(3.0, 1)
    assert pace.requests() == 0, "a prompt that was read took more than was left"
    waited = 0
    while not pace.requests():
        pace.stepped(1.2, 0)
        waited += 1
    assert 0 < waited < 5


def test_more_join_at_once_where_that_costs_the_first_request_nothing() -> None:
    first = waiting([1])
    first.joined = 1
    pace = Pace(first)
    pace.stepped(1.0, 0)
    joining = []
    for _ in range(4):
        joining.append(pace.requests())
        pace.stepped(1.0, joining[-1])
    assert joining == [1, 2, 4, 8]


def test_all_join_when_the_first_request_is_answered_or_failed() -> None:
    first = waiting([1])
    pace = Pace(first)
    pace.drop(first)
    assert pace.requests() > 64
    first.joined, pace = 1, Pace(first)
    first.samples[0] = DrawnSample([], [], [], False)
    pace.stepped(1.0, 0)
    assert pace.requests() > 64
