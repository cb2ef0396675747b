"""AdaMerging and CAT: gradients against finite differences, closed forms, and what they find."""

import pytest
import torch
from torch.testing import assert_close

import compose
from compose.engine.coefficients import Coefficients
from compose.engine.data_merge import merge_with_data
from compose.engine.learning import Learner, group_targets, present_in
from compose.engine.predictions import Predictions, predict
from compose.errors import IncompatibleError

TASKS = ("one", "two")


def batch(seed: int, rows: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 67, (rows, 8), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


DATA = {task: [batch(2 * n), batch(2 * n + 1, 1)] for n, task in enumerate(TASKS)}


@pytest.fixture
def attached(tiny_model, make_bank):
    """A tiny Llama whose random head is loud, so that predictions are not all alike."""
    model = tiny_model("llama").double()
    model.lm_head.weight.data.mul_(40)
    with compose.attach(model, make_bank(model)) as handle:
        yield handle


def weights_of(merged) -> dict[str, dict[str, float]]:
    """Learned weights by adapter and target."""
    return {
        one["name"]: one["weight"] if isinstance(one["weight"], dict) else dict.fromkeys(merged.targets, one["weight"])
        for one in merged.recipe["parents"]
    }


@pytest.mark.parametrize("loss", [Predictions.entropies, Predictions.losses])
@pytest.mark.parametrize("scope", ["task", "layer", "target"])
@pytest.mark.parametrize("softmax", [False, True])
def test_gradients_are_those_of_finite_differences(tiny_model, make_bank, scope, loss, softmax) -> None:
    model = tiny_model("gpt2").double()  # a Llama norms in float32
    attached = compose.attach(model, make_bank(model))
    groups = group_targets(attached, scope)
    gates = (lambda values: values.softmax(1)) if softmax else (lambda values: values)
    learner = Learner(attached, groups, gates, loss)
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(max(groups.values()) + 1, 4, generator=generator, dtype=torch.float64)
    batches = [batch(1), batch(2)]
    found, gradient = learner.step(values, batches)
    direction = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    step = 1e-5
    plus, minus = (learner.step(values + sign * step * direction, batches)[0] for sign in (1, -1))
    assert (plus - minus) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=1e-6, abs=1e-10)
    assert float(gradient.abs().max()) > 1e-6
    with attached.using(Coefficients(gates(values), "outputs", groups)), torch.no_grad():
        expected = sum(float(loss(predict(attached.model, one)).mean()) for one in batches) / 2
    assert found == pytest.approx(expected)


def test_groups_have_a_weight_per_adapter_layer_or_target(attached) -> None:
    assert set(group_targets(attached, "task").values()) == {0}
    assert group_targets(attached, "layer") == attached.layer_groups()
    assert sorted(group_targets(attached, "target").values()) == list(range(len(attached.layers)))
    present = present_in(attached, group_targets(attached, "layer"))
    assert present.tolist() == [[True, False, True, True], [True] * 4, [True] * 4]  # expert-1 misses the first layer


def test_adamerging_lowers_the_entropy(attached) -> None:
    merged = merge_with_data(attached, "adamerging", DATA, steps=40, lr=0.02)
    entropy = merged.recipe["entropy"]
    assert entropy["after"] < entropy["before"] - 0.01
    with attached.using(
        Coefficients(
            torch.tensor(
                [[weights_of(merged)[name][target] for name in attached.bank.names] for target in attached.layers]
            ).double(),
            "outputs",
            group_targets(attached, "target"),
        )
    ):
        means = [torch.cat([predict(attached.model, one).entropies() for one in two]).mean() for two in DATA.values()]
    assert float(sum(means).detach()) / 2 == pytest.approx(entropy["after"], rel=1e-6)


def test_the_first_step_of_adam_moves_every_weight_by_lr_against_its_gradient(attached) -> None:
    merged = merge_with_data(
        attached, "adamerging", {"one": [batch(1)]}, scope="target", steps=1, lr=0.01, clamp=False
    )
    groups = group_targets(attached, "target")
    learner = Learner(attached, groups, lambda values: values, Predictions.entropies)
    start = present_in(attached, groups).double() * 0.3
    _, gradient = learner.step(start, [batch(1)])
    for target, group in groups.items():
        for place, name in enumerate(attached.bank.names):
            expected = float(start[group, place] - 0.01 * gradient[group, place].sign())
            if abs(float(gradient[group, place])) > 1e-5:
                assert weights_of(merged)[name][target] == pytest.approx(expected, abs=1e-4)


def test_adamerging_uses_labels_as_positions_only(attached) -> None:
    other = {key: value.clone() for key, value in batch(1).items()}
    other["labels"][other["labels"] != -100] = 5
    everywhere = {"input_ids": other["input_ids"]}
    first, second, third = (
        merge_with_data(attached, "adamerging", {"one": [one]}, steps=3, lr=0.05)
        for one in (batch(1), other, everywhere)
    )
    assert weights_of(first) == weights_of(second)
    assert weights_of(first) != weights_of(third)


def test_a_task_scope_gives_one_weight_per_adapter_and_clamp_keeps_it_in_bounds(attached) -> None:
    merged = merge_with_data(attached, "adamerging", DATA, scope="task", steps=12, lr=0.1)
    weights = [one["weight"] for one in merged.recipe["parents"]]
    assert all(isinstance(weight, float) and 0 <= weight <= 1 for weight in weights)
    free = merge_with_data(attached, "adamerging", DATA, scope="task", steps=12, lr=0.1, clamp=False)
    assert any(not 0 <= one["weight"] <= 1 for one in free.recipe["parents"])


def test_every_task_counts_the_same_in_a_step(attached) -> None:
    """Ten copies of a task's batch change nothing."""
    more = {"one": DATA["one"][:1] * 10, "two": DATA["two"][:1]}
    less = {"one": DATA["one"][:1], "two": DATA["two"][:1]}
    first, second = (
        weights_of(merge_with_data(attached, "adamerging", one, steps=4, lr=0.05)) for one in (more, less)
    )
    assert first == second


def test_cat_takes_a_single_adapter_as_it_is(tiny_model, make_bank) -> None:
    model = tiny_model("llama")
    only = make_bank(model)["expert-2"]
    with compose.attach(model, compose.Bank.from_adapters([only])) as attached:
        merged = merge_with_data(attached, "cat", DATA, steps=5, lr=0.5)
    assert merged.recipe["parents"][0]["weight"] == 1.0
    for target, update in only.targets.items():
        assert_close(merged.adapter.targets[target].delta(), update.delta())


@pytest.mark.parametrize("scope", ["layer", "target"])
def test_cats_weights_are_positive_and_sum_to_one_over_the_adapters_at_a_target(attached, scope) -> None:
    merged = merge_with_data(attached, "cat", DATA, steps=10, lr=0.3, scope=scope)
    weights = weights_of(merged)
    for target in attached.layers:
        assert sum(weights[name][target] for name in attached.bank.names) == pytest.approx(1)
        assert all(weights[name][target] >= 0 for name in attached.bank.names)
    assert weights["expert-1"]["model.layers.0.mlp.up_proj"] == 0  # it has no such target
    assert merged.recipe["loss"]["after"] < merged.recipe["loss"]["before"]


@pytest.mark.parametrize(("softmax", "lr"), [(True, 0.15), (False, 0.05)])
def test_cat_finds_the_adapter_that_made_the_answers(attached, softmax, lr) -> None:
    """Labels are what the base plus expert-2 says; expert-2's weights grow, the others' shrink."""
    taught = []
    for seed in range(4):
        ids = batch(seed, 8)["input_ids"]
        with attached.using("expert-2"), torch.no_grad():
            answers = attached.model(ids).logits.argmax(-1)
        taught.append({"input_ids": ids, "labels": torch.nn.functional.pad(answers[:, :-1], (1, 0), value=-100)})
    merged = merge_with_data(attached, "cat", {"taught": taught}, steps=120, lr=lr, softmax=softmax)
    means = {name: sum(values.values()) / len(values) for name, values in weights_of(merged).items()}
    assert max(means, key=means.get) == "expert-2"
    assert means["expert-2"] > 0.6 > 0.4 > max(value for name, value in means.items() if name != "expert-2")
    assert merged.recipe["loss"]["after"] < 0.7 * merged.recipe["loss"]["before"]


def test_cat_at_its_start_is_the_mean_and_epochs_are_passes_over_all_batches(attached) -> None:
    said = []
    merged = merge_with_data(attached, "cat", DATA, epochs=3, lr=1e-12, progress=lambda *one: said.append(one))
    assert said[-1] == ("steps", 12, 12)
    target = "model.layers.2.mlp.up_proj"
    mean = sum(attached.bank[name].targets[target].delta() for name in attached.bank.names) / 4
    assert_close(merged.adapter.targets[target].delta(), mean, atol=1e-5, rtol=1e-5)
    assert merged.recipe["loss"]["after"] == pytest.approx(merged.recipe["loss"]["before"])


def test_an_epoch_of_cat_sees_every_batch_once(attached, monkeypatch) -> None:
    seen, original = [], Learner.step

    def watch(self, parameters, batches):
        seen.extend(int(one["input_ids"].sum()) for one in batches)
        return original(self, parameters, batches)

    monkeypatch.setattr(Learner, "step", watch)
    merge_with_data(attached, "cat", DATA)
    assert sorted(seen) == sorted(int(one["input_ids"].sum()) for two in DATA.values() for one in two)


@pytest.mark.parametrize("name", ["cat", "adamerging"])
def test_a_loss_that_is_not_finite_is_refused(attached, name) -> None:
    with torch.no_grad():
        attached.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(IncompatibleError, match="not finite at step 0"):
        merge_with_data(attached, name, DATA)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("adamerging", {"scope": "model"}, "scope must be 'task', 'layer' or 'target'"),
        ("adamerging", {"lr": 0}, "lr must be positive"),
        ("adamerging", {"steps": 0}, "steps must be a whole number"),
        ("adamerging", {"init": 1.5}, "in \\[0, 1\\] with clamp"),
        ("adamerging", {"init": float("nan"), "clamp": False}, "init must be a finite number"),
        ("cat", {"scope": "task"}, "scope must be 'layer' or 'target'"),
        ("cat", {"epochs": 1.5}, "epochs must be a whole number"),
        ("cat", {"steps": 0}, "steps must be a whole number"),
        ("cat", {"weight_decay": -1}, "weight_decay"),
    ],
)
def test_wrong_options_are_refused(attached, name, options, said) -> None:
    with pytest.raises(IncompatibleError, match=said):
        merge_with_data(attached, name, DATA, **options)
