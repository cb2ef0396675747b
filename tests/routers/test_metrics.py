"""The meter on real models: cutting into batches, padding, order of experts, processes; what it refuses."""

import math

import pytest
import torch

from compose.errors import DuplicateNameError, IncompatibleError
from compose.routers.gates.linear import LinearGate
from compose.routers.metrics import RoutingMeter
from compose.routers.selectors.top_k import TopK
from compose.routers.site_metrics import SiteMetrics
from compose.routers.spec import MixtureSpec
from compose.routers.token_strip import TokenStrip

NORMAL = LinearGate(init="normal", std=1.0)
SPECS = {
    "dense": MixtureSpec(gate=NORMAL),
    "sparse": MixtureSpec(gate=NORMAL, select=TopK(k=2), renormalise="sum"),
    "sequence": MixtureSpec(gate=NORMAL, site="block", scope="sequence", gate_input="block", pooling="mean"),
}
TASKS = ("x", "y")


def measure(meter: RoutingMeter, routed, inputs) -> RoutingMeter:
    with torch.no_grad(), routed.recording() as decisions:
        routed(**inputs)
    meter.update(decisions)
    return meter


def fresh(routed, over="real") -> RoutingMeter:
    return RoutingMeter(routed.router.experts, TASKS, over=over)


def rows(inputs, *chosen: int):
    return {name: value[list(chosen)] for name, value in inputs.items()}


def told(batch, name="llama"):
    inputs = {**batch(name), "task_ids": torch.tensor([0, 1, 0])}
    labels = torch.tensor([[0], [3], [2]]).expand(3, 9)
    return inputs if name == "t5" else {**inputs, "expert_labels": labels}


def assert_same(one: RoutingMeter, two: RoutingMeter, tolerance: float = 1e-4) -> None:
    first, second = one.trace().sites, two.trace().sites
    assert [sums.site for sums in first] == [sums.site for sums in second]
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left.sums_LC, right.sums_LC, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("over", ["real", "response"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_parts_merged_equal_all_at_once(spec, over, routed_over, batch) -> None:
    routed, inputs = routed_over("llama", spec), told(batch)
    whole = measure(fresh(routed, over), routed, inputs)
    one = measure(fresh(routed, over), routed, rows(inputs, 0))
    two = measure(fresh(routed, over), routed, rows(inputs, 1, 2))
    one.merge(two)
    assert_same(one, whole)
    again = measure(measure(fresh(routed, over), routed, rows(inputs, 1, 2)), routed, rows(inputs, 0))
    assert_same(again, whole)
    found = whole.trace().overall()
    assert found.decisions > 0
    assert found.active == pytest.approx(2 if spec is SPECS["sparse"] else 4)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_padding_changes_nothing(spec, routed_over, batch) -> None:
    routed, inputs = routed_over("llama", spec), told(batch)
    wide = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 4), value=7),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 4)),
        "labels": torch.nn.functional.pad(inputs["labels"], (0, 4), value=-100),
        "task_ids": inputs["task_ids"],
        "expert_labels": torch.nn.functional.pad(inputs["expert_labels"], (0, 4), value=-1),
    }
    assert_same(measure(fresh(routed), routed, wide), measure(fresh(routed), routed, inputs))


def test_permuting_experts_permutes_the_vectors_and_keeps_the_scalars(routed_over, batch) -> None:
    routed = routed_over("llama", SPECS["sparse"])
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad(), routed.recording() as decisions:
        routed(**told(batch))
    place = torch.argsort(order)
    mixed = [
        each._replace(
            gates_NE=each.gates_NE[:, order], probs_NE=each.probs_NE[:, order], available_E=each.available_E[order],
            labels_N=torch.where(each.labels_N < 0, -1, place[each.labels_N.clamp_min(0)]),
        )
        for each in decisions
    ]  # fmt: skip
    one, two = fresh(routed), fresh(routed)
    one.update(decisions)
    two.update(mixed)
    for sums in one.trace().sites:
        left, right = one.trace().metrics(sums.site, "x"), two.trace().metrics(sums.site, "x")
        for name, value in left.to_json().items():
            other = getattr(right, name)
            if name == "dead":
                assert [int(place[expert]) for expert in value] == sorted(other)
            elif isinstance(value, tuple):
                assert [value[index] for index in order] == pytest.approx(other), name
            else:
                assert other == pytest.approx(value), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_every_architecture_is_measured(name, routed_over, batch) -> None:
    routed = routed_over(name, SPECS["dense"], skip="layers.0")
    inputs = told(batch, name)
    if name == "bert":
        inputs = {key: value for key, value in inputs.items() if key not in ("labels", "expert_labels")}
    trace = measure(fresh(routed), routed, inputs).trace()
    assert [sums.site for sums in trace.sites] == sorted(routed.router.layout, key=[s.site for s in trace.sites].index)
    assert len(trace.sites) == len(routed.router.layout)
    for sums in trace.sites:
        found = trace.metrics(sums.site)
        assert 0 <= found.entropy <= found.entropy_of_mean + 1e-9 <= found.largest_entropy + 2e-9
        assert sum(found.load) == pytest.approx(1)
        assert 0 <= found.task_information <= 1
        assert found.decisions == trace.metrics(sums.site, "x").decisions + trace.metrics(sums.site, "y").decisions
    assert trace.seen_tasks() == TASKS


def test_uniform_gates_by_hand(routed_over, batch) -> None:
    routed = routed_over("llama", MixtureSpec(gate=LinearGate(init="zeros")))
    found = measure(fresh(routed), routed, told(batch)).trace().overall()
    assert isinstance(found, SiteMetrics)
    assert found.decisions == 9 + 9 + 7
    assert found.entropy == pytest.approx(math.log(4))
    assert found.information == pytest.approx(0, abs=1e-6)
    assert found.load == pytest.approx((0.25,) * 4)
    assert (found.max_load, found.load_cv2) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    assert found.accuracy == pytest.approx(9 / 25)  # expert 0 dominates all ties; row 0 names it
    assert found.label_share == pytest.approx(0.25)
    assert (found.switch_rate, found.dead) == (0, ())
    assert found.task_information == pytest.approx(0, abs=1e-9)


def test_switches_of_a_generation_are_counted_per_task(routed_over) -> None:
    routed = routed_over("llama", SPECS["dense"])
    meter = fresh(routed)
    with routed.recording() as decisions:
        answers = routed.generate([[5, 6, 7], [8, 9]], max_new_tokens=6, stop_ids=[1], task_ids=torch.tensor([1, 1]))
    meter.update_generation(decisions, rows=2, lengths=[len(answer) for answer in answers])
    trace = meter.trace()
    site = trace.sites[0].site
    assert trace.metrics(site, "x") is None
    assert trace.metrics(site, "y").decisions == 0
    pairs = sum(min(len(answer), 5) for answer in answers)
    assert pairs >= 5
    assert float(trace.sites[0].scalar("pairs")[2]) == pairs
    assert trace.metrics(site).switch_rate == float(trace.sites[0].scalar("switches")[2]) / pairs
    assert trace.overall() is None  # nothing but switches was counted


def test_gradients_of_gates(routed_over, batch) -> None:
    routed = routed_over("llama", SPECS["dense"])
    meter = fresh(routed)
    meter.update_gradients(routed.router)
    assert meter.trace().gradients == {}
    routed(**batch("llama")).loss.backward()
    site = next(iter(routed.router.layout))
    wanted = math.sqrt(sum(float(p.grad.square().sum()) for p in routed.router.site(site).parameters()))
    meter.update_gradients(routed.router)
    meter.update_gradients(routed.router)
    assert meter.trace().gradients[site].mean == pytest.approx(wanted)
    assert meter.trace().gradients[site].count == 2
    other = fresh(routed)
    other.merge(meter)
    assert other.trace().gradients == meter.trace().gradients


def test_cosines_of_the_experts(routed_over) -> None:
    routed = routed_over("llama", SPECS["dense"])
    meter = fresh(routed)
    meter.measure_experts(routed)
    cosines = torch.tensor(meter.trace().cosines)
    deltas = [
        torch.cat([(u.scaling * u.b @ u.a).flatten() for u in routed.attached.bank[name].targets.values()])
        for name in routed.router.experts
    ]
    wanted = torch.nn.functional.normalize(torch.stack(deltas), dim=-1)
    torch.testing.assert_close(cosines, wanted @ wanted.T, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_added_is_refused(routed_over, batch) -> None:
    routed = routed_over("llama", SPECS["dense"])
    meter = fresh(routed)
    for other in (RoutingMeter(["a"] * 4, TASKS), RoutingMeter(meter.experts), fresh(routed, "response")):
        with pytest.raises(IncompatibleError, match="cannot be added"):
            meter.merge(other)
    with pytest.raises(IncompatibleError, match="gates of 4 experts, the meter has 3"):
        measure(RoutingMeter(["a", "b", "c"]), routed, batch("llama"))
    with pytest.raises(IncompatibleError, match="must be real or response"):
        RoutingMeter(["a"], over="prompt")
    with pytest.raises(DuplicateNameError, match="a name twice"):
        RoutingMeter(["a"], ["t", "t"])


def test_strips_are_kept_by_name() -> None:
    meter = RoutingMeter(["a"])
    strip = TokenStrip(name="s", tokens=("x",), prompt_length=1)
    meter.keep(strip)
    with pytest.raises(DuplicateNameError, match="'s'"):
        meter.keep(strip)
    meter.merge(meter.trace())
    assert meter.trace().strips == (strip,)
    other = RoutingMeter(["a"])
    other.keep(TokenStrip(name="s", tokens=("y",), prompt_length=1))
    with pytest.raises(DuplicateNameError, match="'s'"):
        meter.merge(other)


def test_one_process_gathers_its_own(routed_over, batch) -> None:
    routed = routed_over("llama", SPECS["dense"])
    meter = measure(fresh(routed), routed, told(batch))
    gathered = meter.gather()
    assert gathered is not meter
    assert_same(gathered, meter, 0)
