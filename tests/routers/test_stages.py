"""Stages: schedules against those of transformers, places in a run, which records a stage takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compose.errors import IncompatibleError
from compose.routers.records import MixedExample
from compose.routers.sampling import Sampling
from compose.routers.stages import Place, Plan, Stage, plan_stages, rate_factor
from compose.text.examples import Example


def transformers_factors(name: str, total: int, warmup: int) -> list[float]:
    from transformers import get_scheduler

    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    kind = "constant_with_warmup" if name == "constant" else name
    schedule = get_scheduler(kind, optimiser, num_warmup_steps=warmup, num_training_steps=total)
    found = []
    for _ in range(total + 3):
        found.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("total", "warmup"), [(10, 0), (10, 3), (1, 0), (7, 6)])
def test_schedules_equal_those_of_transformers(name, total, warmup) -> None:
    # theirs go on with the cosine past the end and clamp the linear one; ours stays at the end
    ours = [rate_factor(name, step, total=total, warmup=warmup) for step in range(total + 1)]
    assert ours == pytest.approx(transformers_factors(name, total, warmup)[: total + 1], abs=1e-12)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    total=st.integers(1, 300),
    part=st.floats(0, 0.99),
    final=st.floats(0, 1),
)
def test_rates_rise_then_fall_to_the_end(schedule, total, part, final) -> None:
    warmup = int(part * total)
    factors = [rate_factor(schedule, step, total=total, warmup=warmup, final=final) for step in range(total + 2)]
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup] == pytest.approx(1.0)
    assert all(now >= later - 1e-12 for now, later in zip(factors[warmup:], factors[warmup + 1 :], strict=False))
    assert factors[total] == factors[total + 1] == pytest.approx(1.0 if schedule == "constant" else final)


def test_a_run_of_stages() -> None:
    first = Stage(name="experts", train="experts", steps=3, learning_rate=0.5)
    second = Stage(
        name="joint", train="both", epochs=1, learning_rate=0.1, expert_learning_rate=0.01, schedule="linear", warmup=1
    )
    plan = Plan((first, second), (3, 5))
    assert plan.total == 8
    assert [plan.place(step) for step in (0, 2, 3, 7, 8)] == [
        Place(0, 0), Place(0, 2), Place(1, 0), Place(1, 4), Place(1, 5),
    ]  # fmt: skip
    assert plan.rates(1) == (0.5, 0.5)
    assert plan.rates(3) == (0.0, 0.0)
    assert plan.rates(6) == pytest.approx((0.05, 0.005))
    with pytest.raises(IncompatibleError, match="step 9 is not one of this run, which has 8"):
        plan.place(9)
    with pytest.raises(IncompatibleError, match="2 stages need as many numbers of steps"):
        Plan((first, second), (3,))
    with pytest.raises(IncompatibleError, match="joint is there more than once"):
        Plan((second, second), (1, 1))
    with pytest.raises(IncompatibleError, match="at least one stage"):
        Plan((), ())
    with pytest.raises(IncompatibleError, match="stage 'joint': warmup 1 takes all of its 1 steps"):
        Plan((second,), (1,))


def test_a_stage_takes_records_by_task_and_expert() -> None:
    def record(task, expert=None):
        return MixedExample(Example("p", "r"), task, expert)

    examples = [record("a", "x"), record("b", "x"), record("a"), record("c", "y")]
    assert Stage(name="s", steps=1).select(examples) == [0, 1, 2, 3]
    assert Stage(name="s", steps=1, tasks=("c", "a")).select(examples) == [0, 2, 3]
    assert Stage(name="s", steps=1, experts=("x",)).select(examples) == [0, 1]
    assert Stage(name="s", steps=1, experts=("x",), tasks=("b",)).select(examples) == [1]
    with pytest.raises(IncompatibleError, match="stage 's': unknown task among the records 'aa'; did you mean 'a'"):
        Stage(name="s", steps=1, tasks=("aa",)).select(examples)
    with pytest.raises(IncompatibleError, match="unknown expert among the records 'z'"):
        Stage(name="s", steps=1, experts=("z",)).select(examples)
    with pytest.raises(IncompatibleError, match="stage 's' has no records"):
        Stage(name="s", steps=1, experts=("y",), tasks=("b",)).select(examples)


def test_a_plan_has_a_sampler_for_each_stage() -> None:
    examples = [MixedExample(Example(str(number), "r"), "ab"[number % 2]) for number in range(10)]
    stages = [
        Stage(name="one", epochs=2, tasks=("b",)),
        Stage(name="two", steps=4, batch_size=6, accumulation=3, sampling=Sampling(batch="homogeneous")),
    ]
    plan, samplers = plan_stages(stages, examples, sampling=Sampling(), batch_size=2, seed=1)
    assert plan == Plan(tuple(stages), (5, 4))
    drawn = [number for step in range(5) for micro in samplers[0].batch(step) for number in micro]
    assert sorted(drawn) == sorted([1, 3, 5, 7, 9] * 2)
    assert [len(micro) for micro in samplers[1].batch(0)] == [2, 2, 2]
    assert samplers[1].seed == stages[1].seed(1)
    with pytest.raises(
        IncompatibleError, match="stage 'one': a balanced micro-batch of 3 records cannot hold 2 tasks"
    ):
        plan_stages([Stage(name="one", steps=1)], examples, sampling=Sampling(batch="balanced"), batch_size=3)


def test_stages_draw_differently_and_the_same_again() -> None:
    seeds = [Stage(name=name, steps=1).seed(run) for name in ("one", "two") for run in (0, 1)]
    assert len(set(seeds)) == 4
    assert Stage(name="one", steps=9, sampling=Sampling(by="sqrt")).seed(0) == seeds[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "needs a name"),
        ({"steps": None}, "needs steps or epochs, one of them"),
        ({"epochs": 1.0}, "needs steps or epochs, one of them"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"accumulation": -1}, "accumulation must be at least 1"),
        ({"steps": None, "epochs": 0.0}, "epochs must be a number > 0"),
        ({"train": "gates"}, "train must be one of preset, router, experts, both; got 'gates'"),
        ({"schedule": "step"}, "schedule must be one of constant, linear, cosine"),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0"),
        ({"expert_learning_rate": float("inf")}, "expert_learning_rate must be a number > 0"),
        ({"expert_learning_rate": 1.0, "train": "router"}, "goes with stages that train experts"),
        ({"warmup": 5}, r"warmup must lie in 0..steps - 1, got 5 of 5"),
        ({"warmup": -1}, "warmup must lie in"),
        ({"final": 2.0, "schedule": "linear"}, r"final must lie in \[0, 1\]"),
        ({"final": 0.5}, "goes with linear and cosine schedules"),
    ],
)
def test_impossible_stages(options, message) -> None:
    with pytest.raises(IncompatibleError, match=message):
        Stage(**{"name": "s", "steps": 5, **options})


def test_all_problems_of_a_stage_are_told_at_once() -> None:
    with pytest.raises(
        IncompatibleError, match=r"steps must be at least 1.*train must be one of.*learning_rate must be"
    ):
        Stage(name="s", steps=0, train="x", learning_rate=-1)
