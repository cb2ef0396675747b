"""Sampling laws: shares, epochs, weights, kinds of batches, resuming, processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.errors import IncompatibleError
from compose.routers.records import MixedExample
from compose.routers.sampling import Sampling, TaskSampler
from compose.text.examples import Example

BYS = ("proportional", "sqrt", "equal", "temperature")


def records(sizes, weights=None) -> list[MixedExample]:
    """Records of tasks t0, t1, ... in an order that mixes the tasks."""
    tasks = [f"t{task}" for task, size in enumerate(sizes) for _ in range(size)]
    order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(0)).tolist()
    given_ = weights or [1.0] * len(tasks)
    return [MixedExample(Example(str(number), "r"), tasks[number], weight=given_[number]) for number in order]


def sampling_of(by: str, batch: str = "mixed") -> Sampling:
    return Sampling(by=by, temperature=3.0 if by == "temperature" else None, batch=batch)


def flat(batch) -> list[int]:
    return [number for micro in batch for number in micro]


def tally(data, numbers) -> dict[str, int]:
    counts = dict.fromkeys(sorted({each.task for each in data}), 0)
    for number in numbers:
        counts[data[number].task] += 1
    return counts


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [100, 16, 4]),
        (Sampling(by="sqrt"), [10, 4, 2]),
        (Sampling(by="equal"), [1, 1, 1]),
        (Sampling(by="temperature", temperature=1.0), [100, 16, 4]),
        (Sampling(by="temperature", temperature=2.0), [10, 4, 2]),
        (Sampling(by="temperature", temperature=0.5), [10000, 256, 16]),
        (Sampling(batch="balanced"), [1, 1, 1]),
    ],
)
def test_shares(sampling, expected) -> None:
    found = sampling.shares([100, 16, 4])
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected) / sum(expected))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    by=st.sampled_from(BYS),
    batch=st.sampled_from(["mixed", "homogeneous"]),
    micro=st.integers(1, 6),
    accumulation=st.integers(1, 3),
    steps=st.integers(1, 60),
    seed=st.integers(),
)
def test_drawn_counts_follow_the_shares(sizes, by, batch, micro, accumulation, steps, seed) -> None:
    """Less than one slot from the share after every whole round, and in between not outside of what its ends have."""
    data = records(sizes)
    sampler = TaskSampler(
        data, sampling_of(by, batch), batch_size=micro * accumulation, accumulation=accumulation, seed=seed
    )
    numbers = [number for step in range(steps) for number in flat(sampler.batch(step))]
    drawn = tally(data, numbers)
    assert drawn == sampler.counts(0, steps)
    slot = micro if batch == "homogeneous" else 1
    rounds = len(numbers) // slot // sampler.round_slots
    for task, share in sampler.shares.items():
        assert drawn[task] % slot == 0
        least = rounds * sampler.round_slots * share - 1
        most = (rounds + 1) * sampler.round_slots * share + 1
        assert least < drawn[task] // slot < most


@pytest.mark.parametrize("by", BYS)
def test_counts_match_the_shares_over_many_steps(by) -> None:
    data = records([60, 25, 10, 5])
    sampler = TaskSampler(data, sampling_of(by), batch_size=10, seed=3)
    counts = sampler.counts(0, 1000)  # 10,000 records, one hundred rounds
    for task, share in sampler.shares.items():
        assert abs(counts[task] - 10_000 * share) < 1


def test_first_steps_have_no_favourite_tasks() -> None:
    """Averaged over seeds the very first batch already follows the shares."""
    data = records([8, 4, 4])
    seeds = 1000
    first = [flat(TaskSampler(data, Sampling(), batch_size=1, seed=seed).batch(0))[0] for seed in range(seeds)]
    counts = tally(data, first)
    for task, share in {"t0": 0.5, "t1": 0.25, "t2": 0.25}.items():
        deviation = (seeds * share * (1 - share)) ** 0.5
        assert abs(counts[task] - seeds * share) < 4 * deviation


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    kind=st.sampled_from([*((by, batch) for by in BYS for batch in ("mixed", "homogeneous")), (None, "balanced")]),
    each=st.integers(1, 3),
    seed=st.integers(),
)
def test_a_task_is_seen_whole_before_any_record_comes_again(sizes, kind, each, seed) -> None:
    data = records(sizes)
    size = each * len(sizes)
    sampler = TaskSampler(data, sampling_of(*kind), batch_size=2 * size, accumulation=2, seed=seed)
    seen: dict[str, list[int]] = {task: [] for task in sampler.tasks}
    for step in range(2 * len(data) // size + 1):
        for number in flat(sampler.batch(step)):
            seen[data[number].task].append(number)
    for task, numbers in seen.items():
        size = sizes[int(task[1:])]
        for start in range(0, len(numbers), size):
            cycle = numbers[start : start + size]
            assert len(set(cycle)) == len(cycle)


def test_a_round_of_proportional_mixed_batches_is_an_epoch_in_a_new_order_each_time() -> None:
    data = records([7, 5])
    sampler = TaskSampler(data, Sampling(), batch_size=4)
    assert sampler.num_steps(1) == 3
    assert sampler.num_steps(0.1) == 1
    assert sampler.num_steps(2.5) == 8
    epochs = [[number for step in range(3) for number in flat(sampler.batch(3 * epoch + step))] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    tasks = [[data[number].task for number in epoch] for epoch in epochs]
    assert tasks[0] != tasks[1] != tasks[2]


@pytest.mark.parametrize("seed", range(5))
def test_a_task_rarer_than_one_in_an_epoch_comes_once_in_a_round(seed) -> None:
    sampler = TaskSampler(records([4, 1]), Sampling(by="temperature", temperature=0.5), batch_size=1, seed=seed)
    assert sampler.shares["t1"] == pytest.approx(1 / 17)
    assert sampler.round_slots == 17
    assert [sampler.counts(start, start + 17)["t1"] for start in range(0, 170, 17)] == [1] * 10


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    batch=st.sampled_from(["mixed", "homogeneous", "balanced"]),
    each=st.integers(1, 3),
    world=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    step=st.integers(0, 10**6),
    seed=st.integers(),
)
def test_any_step_comes_again_and_processes_share_it(sizes, batch, each, world, accumulation, step, seed) -> None:
    data = records(sizes)
    size = each * world * accumulation * len(sizes)

    def fresh() -> TaskSampler:
        return TaskSampler(data, Sampling(batch=batch), batch_size=size, accumulation=accumulation, seed=seed)

    used = fresh()
    for other in (0, 1, max(0, step - 1), step + 1):
        used.batch(other)
        used.counts(0, other)
    whole = used.batch(step)
    assert whole == fresh().batch(step)
    assert [len(micro) for micro in whole] == [size // accumulation] * accumulation
    parts = [fresh().batch(step, rank=rank, world=world) for rank in range(world)]
    for number, micro in enumerate(whole):
        assert micro == tuple(record for part in parts for record in part[number])
    for part in parts:
        for micro in part:
            counts = set(tally(data, micro).values())
            if batch == "homogeneous":
                assert sum(1 for count in tally(data, micro).values() if count) == 1
            if batch == "balanced":
                assert len(counts) == 1


def test_seeds_differ_and_order_of_records_changes_only_their_numbers() -> None:
    data = records([9, 6])
    batches = {TaskSampler(data, Sampling(), batch_size=5, seed=seed).batch(0) for seed in range(5)}
    assert len(batches) == 5
    grown = [*data, MixedExample(Example("new", "r"), "t9", weight=0.0)]
    with pytest.raises(IncompatibleError, match="every record of task t9 has weight 0"):
        TaskSampler(grown, Sampling(), batch_size=5)


def test_weights_count_within_a_task_and_for_its_share() -> None:
    weights = [1.0, 2.0, 0.5, 0.0, 3.0, 1.0, 1.0]
    data = records([5, 2], weights)
    sampler = TaskSampler(data, Sampling(), batch_size=7, seed=1)
    assert sampler.shares == {"t0": pytest.approx(6.5 / 8.5), "t1": pytest.approx(2 / 8.5)}
    assert sampler.num_records == 6
    drawn = torch.zeros(7)
    steps = 1000
    for step in range(steps):
        for number in flat(sampler.batch(step)):
            drawn[int(data[number].example.input)] += 1
    expected = torch.tensor(weights) / sum(weights) * steps * 7
    assert drawn[3] == 0
    # four deviations of a coin thrown per step
    torch.testing.assert_close(drawn, expected, rtol=0, atol=64)


def test_a_cycle_with_weights_holds_each_record_about_as_often_as_expected() -> None:
    weights = [1.0, 2.0, 0.5, 4.5]
    sampler = TaskSampler(records([4], weights), Sampling(), batch_size=4)
    data = records([4], weights)
    for step in range(50):
        inputs = [int(data[number].example.input) for number in flat(sampler.batch(step))]
        for number, weight in enumerate(weights):
            assert abs(inputs.count(number) - 4 * weight / 8) < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "size"}, "by must be one of proportional, sqrt, equal, temperature; got 'size'"),
        ({"batch": "mix"}, "batch must be one of mixed, homogeneous, balanced; got 'mix'"),
        ({"by": "temperature"}, "temperature goes with by 'temperature', which needs it"),
        ({"temperature": 2.0}, "temperature goes with by 'temperature'"),
        ({"by": "temperature", "temperature": 0.0}, "temperature must be a number > 0"),
        ({"by": "temperature", "temperature": float("nan")}, "temperature must be a number > 0"),
        ({"by": "sqrt", "batch": "balanced"}, "leave out by, which is 'sqrt'"),
    ],
)
def test_impossible_samplings(options, message) -> None:
    with pytest.raises(IncompatibleError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    ("sizes", "sampling", "options", "message"),
    [
        ([], Sampling(), {"batch_size": 4}, "no records to sample"),
        ([2], Sampling(), {"batch_size": 0}, "must be >= 1, got 0"),
        ([2], Sampling(), {"batch_size": 4, "accumulation": 3}, "cannot be cut into 3 equal"),
        (
            [2, 2, 2],
            Sampling(batch="balanced"),
            {"batch_size": 8, "accumulation": 2},
            "4 records cannot hold 3 tasks.*of 6",
        ),
        (
            [10**4, 1],
            Sampling(by="temperature", temperature=0.5),
            {"batch_size": 4},
            "task 't1' has a share of 1.0e-08",
        ),
    ],
)
def test_impossible_samplers(sizes, sampling, options, message) -> None:
    with pytest.raises(IncompatibleError, match=message):
        TaskSampler(records(sizes), sampling, **options)


def test_impossible_steps_and_processes() -> None:
    sampler = TaskSampler(records([4, 4]), Sampling(batch="balanced"), batch_size=6)
    assert [len(micro) for micro in sampler.batch(0, rank=2, world=3)] == [2]
    with pytest.raises(
        IncompatibleError, match=r"6 records cannot be shared by 2 processes with each of 2 tasks.*of 4"
    ):
        sampler.batch(0, world=2)
    with pytest.raises(IncompatibleError, match="rank must lie in 0"):
        sampler.batch(0, rank=3, world=3)
    with pytest.raises(IncompatibleError, match="step must be >= 0"):
        sampler.batch(-1)
    with pytest.raises(IncompatibleError, match="0 <= start <= stop"):
        sampler.counts(2, 1)
    with pytest.raises(IncompatibleError, match="epochs must be a number > 0"):
        sampler.num_steps(0)
