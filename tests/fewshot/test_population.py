"""The population objective: equal to one-by-one evaluation, exact gradients, and LoRAHub's procedure through PEFT."""

import copy

import numpy as np
import pytest
import torch

import compose
from compose.engine.coefficients import Coefficients
from compose.fewshot.losses import response_losses
from compose.fewshot.population import PopulationObjective
from compose.formats.peft import write_adapter
from compose.text.encoding import encode


@pytest.fixture
def shots(loaded, task):
    return encode(task[:5], loaded.tokenizer, loaded.prompt_format, encoder_decoder=False)


@pytest.fixture
def attached(loaded, bank):
    with compose.attach(loaded.model, bank) as handle:
        yield handle


def objective_of(attached, shots, combine, layers, **options) -> PopulationObjective:
    groups = attached.layer_groups() if layers else None
    return PopulationObjective(attached, shots, combine=combine, groups=groups, **options)


@pytest.mark.parametrize("combine", ["outputs", "parameters"])
@pytest.mark.parametrize("layers", [False, True], ids=["scalar", "layers"])
def test_a_population_equals_its_candidates_one_by_one(attached, shots, combine, layers) -> None:
    objective = objective_of(attached, shots, combine, layers)
    weights = np.random.default_rng(0).normal(size=(4, objective.num_groups * 6)) * 0.5
    together = objective(weights).losses
    for candidate, row in zip(weights, together, strict=True):
        values = torch.from_numpy(candidate).float().view(objective.num_groups, 6)
        groups = attached.layer_groups() if layers else None
        with attached.using(Coefficients(values if layers else values[0], combine, groups)), torch.no_grad():
            alone = [float(response_losses(attached.model, [shot])) for shot in shots]
        np.testing.assert_allclose(row, alone, atol=2e-5)


@pytest.mark.parametrize("combine", ["outputs", "parameters"])
@pytest.mark.parametrize("layers", [False, True], ids=["scalar", "layers"])
def test_candidates_of_few_adapters_equal_the_dense_evaluation(attached, shots, combine, layers, monkeypatch) -> None:
    objective = objective_of(attached, shots, combine, layers)
    weights = np.zeros((3, objective.num_groups, 6))
    weights[0, :, 4], weights[1, -1, 1] = 1.0, -0.7
    weights = weights.reshape(3, -1)
    sparse = objective(weights).losses
    monkeypatch.setattr("compose.fewshot.population.SPARSE_SHARE", 100)
    np.testing.assert_allclose(sparse, objective(weights).losses, atol=2e-5)


def test_the_result_does_not_depend_on_the_chunks(attached, shots) -> None:
    weights = np.random.default_rng(0).normal(size=(7, 6)) * 0.5
    whole = objective_of(attached, shots, "outputs", False)(weights, gradient=True)
    for tokens in (1, 40, 150):
        cut = objective_of(attached, shots, "outputs", False, max_tokens=tokens)(weights, gradient=True)
        np.testing.assert_allclose(cut.losses, whole.losses, atol=1e-5)
        np.testing.assert_allclose(cut.gradients, whole.gradients, atol=1e-5)
        assert cut.cost == whole.cost == 14.0


@pytest.mark.parametrize("combine", ["outputs", "parameters"])
@pytest.mark.parametrize("layers", [False, True], ids=["scalar", "layers"])
def test_gradients_equal_finite_differences_in_float64(loaded, bank, shots, combine, layers) -> None:
    model = copy.deepcopy(loaded.model).double()
    with compose.attach(model, bank) as attached:
        objective = objective_of(attached, shots, combine, layers)
        generator = np.random.default_rng(1)
        weights = generator.normal(size=(2, objective.num_groups * 6)) * 0.3
        pull = generator.dirichlet(np.ones(5), size=2)
        found = objective(weights, gradient=True, example_weights=pull).gradients
        step = 1e-3  # coefficients enter as float32: larger than its rounding, small against the curvature
        for index in generator.choice(weights.shape[1], size=4, replace=False):
            shift = np.zeros_like(weights)
            shift[:, index] = step
            up, down = (objective(weights + sign * shift).losses for sign in (1, -1))
            slope = ((up - down) * pull).sum(axis=1) / (2 * step)
            np.testing.assert_allclose(found[:, index], slope, atol=2e-3, rtol=2e-3)


def test_parameters_combined_equal_lorahubs_procedure_through_peft(loaded, bank, shots, tmp_path) -> None:
    """arXiv:2307.13269 as published: weighted sums of state dicts, loaded into one PEFT model, mean cross-entropy."""
    peft = pytest.importorskip("peft", reason="PEFT carries the published procedure")
    equal_rank = bank.select(["skill-0", "skill-3"])
    members = [equal_rank[name] for name in equal_rank.names]
    folders = [write_adapter(member, tmp_path / member.name) for member in members]
    from safetensors.torch import load_file

    states = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(loaded.model), str(folders[0])).eval()
    keys = list(states[0])
    weights = np.random.default_rng(2).normal(size=(3, len(states)))
    with compose.attach(loaded.model, equal_rank) as attached:
        found = PopulationObjective(attached, shots, combine="parameters")(weights).losses
    for candidate, row in zip(weights, found, strict=True):
        summed = {
            key: sum(w * state[key] for w, state in zip(candidate.tolist(), states, strict=True)) for key in keys
        }
        peft.set_peft_model_state_dict(wrapped, summed)
        with torch.no_grad():
            wanted = [float(response_losses(wrapped, [shot])) for shot in shots]
        np.testing.assert_allclose(row, wanted, atol=2e-5)
