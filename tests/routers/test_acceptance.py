"""The eighteen acceptance tests of mixtures: where each is, and those that stand nowhere else."""

import ast
import json
from pathlib import Path

import pytest
import torch

from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.attach import attach
from compose.errors import IncompatibleError
from compose.routers.builder import build
from compose.routers.gates.linear import LinearGate
from compose.routers.general_knowledge import subtract_general
from compose.routers.losses.load_balance import SwitchLoadBalance
from compose.routers.presets.registry import PRESETS, experts_for, preset
from compose.routers.saved import save
from compose.routers.selectors.argmax import Argmax
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec

TESTS = Path(__file__).resolve().parents[1]
HERE = "routers/test_acceptance.py"
LAWS = "routers/presets/test_laws.py"
RUNTIME = "routers/test_runtime.py"

INDEX = {
    "1 outputs and parameters differ, and the saved config says which": (
        f"{LAWS}::test_mixing_parameters_and_outputs_are_different_functions",
        "routers/presets/test_arrow.py::test_mixed_parameters_are_another_function",
        f"{HERE}::test_what_is_combined_is_named_in_the_saved_config",
    ),
    "2 truth table of top-k and renormalisation": (
        "routers/test_renormalise.py::test_truth_table",
        "routers/test_renormalise.py::test_mass",
    ),
    "3 no double softmax unless it is asked for": (
        "routers/test_renormalise.py::test_the_double_softmax_is_flatter",
        f"{HERE}::test_a_double_softmax_stands_only_where_the_authors_code_has_one",
    ),
    "4 load balance: 1 or k at its optimum": (
        "routers/losses/test_load_balance.py::test_values_at_balance_are_1_and_k",
        "routers/losses/test_load_balance.py::test_mixtral_agrees_with_transformers",
    ),
    "5 padding changes neither losses nor utilisation": (
        f"{LAWS}::test_padding_changes_nothing",
        "routers/test_metrics.py::test_padding_changes_nothing",
        "routers/test_collate.py::test_padding_side_and_width_change_no_loss",
    ),
    "6 gates per sequence do not read the response": (
        f"{LAWS}::test_no_decision_on_the_prompt_reads_the_response",
        "routers/test_routed.py::test_a_gate_per_sequence_never_reads_the_response",
    ),
    "7 cached logits equal uncached ones, X-LoRA with two caches": (
        f"{LAWS}::test_steps_with_a_cache_equal_one_forward",
        f"{RUNTIME}::test_every_step_with_a_cache_gives_the_logits_without",
        f"{RUNTIME}::test_cache_beams_and_batches_change_nothing",
        "routers/test_xlora_peft.py::test_generated_tokens",
    ),
    "8 experts of different ranks, scalings and targets": (
        "routers/test_routed.py::test_a_missing_expert_is_masked_or_zero",
        "routers/test_mixing.py::test_the_rest_takes_over_the_share_of_a_missing_expert",
        f"{HERE}::test_ranks_rslora_and_targets_of_peft_adapters",
    ),
    "9 DoRA, biases and modules_to_save are refused by name": (
        f"{HERE}::test_experts_that_are_more_are_refused_by_name",
    ),
    "10 gates by module path and expert name; another process gives identical logits": (
        "routers/test_saved.py::test_another_process_computes_identical_logits",
        "routers/test_saved.py::test_another_order_or_other_adapters_are_refused_with_the_next_step",
        "routers/test_saved_laws.py::test_a_saved_preset_computes_the_same",
    ),
    "11 the base is unchanged afterwards": (
        f"{LAWS}::test_nothing_is_left_behind",
        "routers/presets/test_goat.py::test_the_base_is_never_edited",
        "routers/test_general_knowledge.py::test_deltas_are_subtracted_exactly",
        f"{HERE}::test_goat_and_general_knowledge_leave_base_and_bank_as_they_were",
    ),
    "12 generate leaves mode and requires_grad alone": (f"{RUNTIME}::test_generate_leaves_mode_and_gradients_alone",),
    "13 deterministic prototypes, whatever the sign": (
        "routers/test_spectrum.py::test_it_is_the_spectrum_of_the_product",
        f"{HERE}::test_training_free_gates_depend_on_deltas_alone",
    ),
    "14 thresholds never leave a decision without experts": (
        f"{LAWS}::test_every_decision_has_an_expert_and_top_k_has_k",
        "routers/selectors/test_threshold.py::test_the_bound_is_one_over_available_experts",
        "routers/normalisations/test_sparsegen.py::test_more_sparsity_leaves_fewer_and_at_least_one",
    ),
    "15 losses without gradients of inputs and under checkpointing": (
        f"{RUNTIME}::test_checkpointing_changes_no_gradient",
        f"{HERE}::test_losses_have_gradients_where_inputs_have_none_and_count_once_under_checkpointing",
    ),
    "16 several processes, experts that nobody chooses": (
        "routers/test_training_distributed.py::test_two_processes_train_what_one_does",
        "routers/losses/test_total.py::test_two_processes_add_up",
        f"{HERE}::test_experts_that_nobody_chooses_have_gradients_of_zero",
    ),
    "17 float32 gates in bfloat16": (
        f"{LAWS}::test_gates_stay_float32_in_a_bfloat16_model",
        f"{RUNTIME}::test_a_bf16_model_keeps_float32_gates",
    ),
    "18 a router that beats nothing is reported as such": (
        "evaluation/test_result.py::test_a_router_that_beats_nothing_is_told_so",
        "evaluation/test_result.py::test_random_gates_are_rivals_and_few_seeds_are_told",
    ),
}


def test_all_eighteen_are_here() -> None:
    assert [int(name.split()[0]) for name in INDEX] == list(range(1, 19))


@pytest.mark.parametrize("number", INDEX)
def test_what_is_listed_exists(number) -> None:
    for place in INDEX[number]:
        file, _, name = place.partition("::")
        functions = {node.name for node in ast.parse((TESTS / file).read_text()).body if hasattr(node, "name")}
        assert name in functions, place


@pytest.mark.parametrize("combine", ["outputs", "parameters"])
def test_what_is_combined_is_named_in_the_saved_config(combine, routed_over, tmp_path) -> None:
    routed = routed_over("llama", MixtureSpec(combine=combine))
    plain = json.loads((save(routed, tmp_path / "saved") / "mixture.json").read_text())
    assert plain["spec"]["combine"] == combine


def test_a_double_softmax_stands_only_where_the_authors_code_has_one() -> None:
    double = {name for name in PRESETS if PRESETS[name].spec.renormalise == "softmax_probs"}
    assert double == {"hmora_top2", "dlp"}
    assert "second softmax" in PRESETS["hmora_top2"].summary
    assert any("double softmax" in each for each in PRESETS["dlp"].spec.departures)


def peft_adapter(folder, peft, name, tiny_model, **options):
    """Save an adapter that PEFT made, as if trained (B is not zero), and return the model with it."""
    torch.manual_seed(len(name))
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(init_lora_weights=False, **options))
    model.save_pretrained(str(folder / name))
    return model.eval()


def test_ranks_rslora_and_targets_of_peft_adapters(tmp_path, tiny_model) -> None:
    """A gate of 1 computes PEFT's adapter, whatever its rank, scaling and targets."""
    peft = pytest.importorskip("peft")
    options = {
        "one": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        "three": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    }
    ids = torch.randint(3, 67, (2, 7))
    wanted = {}
    for name, each in options.items():
        with torch.no_grad():
            wanted[name] = peft_adapter(tmp_path, peft, name, tiny_model, **each)(input_ids=ids).logits
    with attach(tiny_model("llama"), Bank.open(tmp_path)) as attached:
        routed = build(attached, preset("linear_fusion", missing="zero"))
        assert {layer.stack.ranks for layer in attached.layers.values()} == {(4, 2), (4, 0), (0, 2)}
        for name, logits in wanted.items():
            gates = torch.tensor([float(each == name) for each in attached.bank.names])
            with torch.no_grad(), routed.transformed(lambda _, routing, gates=gates: routing._replace(gates=gates)):
                mixed = routed(input_ids=ids).logits
            torch.testing.assert_close(mixed, logits, rtol=1e-4, atol=1e-5)
        assert (wanted["one"] - wanted["three"]).abs().max() > 1e-2


def test_experts_that_are_more_are_refused_by_name(tiny_model) -> None:
    model = tiny_model("llama")
    target = "model.layers.0.mlp.up_proj"
    update = {target: LowRank(torch.ones(1, 32), torch.ones(48, 1), 1.0)}
    head = {"lm_head.weight": torch.zeros(67, 32)}
    rows = {"model.embed_tokens": LowRank(torch.ones(1, 67), torch.ones(32, 1), 1.0, kind="embedding")}
    bank = Bank.from_adapters(
        [
            Adapter("good", "", update, config={"bias": "none", "use_dora": False}),
            Adapter("with-magnitudes", "", update, config={"use_dora": True}),
            Adapter("with-biases", "", update, config={"bias": "lora_only"}),
            Adapter("with-a-head", "", update, full_modules=head),
            Adapter("with-embeddings", "", {**update, **rows}),
        ]
    )
    with attach(model, bank) as attached, pytest.raises(IncompatibleError) as refused:
        build(attached, preset("arrow", targets="up_proj"))
    message = str(refused.value)
    for said in (
        "with-magnitudes: DoRA magnitudes", "with-biases: trained biases ('lora_only')",
        "with-a-head: modules_to_save 'lm_head.weight'", "with-embeddings: an embedding at 'model.embed_tokens'",
        "compose convert",
    ):  # fmt: skip
        assert said in message
    assert "good" not in message
    with attach(model, bank.select(["good"])) as attached:
        build(attached, preset("arrow", targets="up_proj"))


def test_goat_and_general_knowledge_leave_base_and_bank_as_they_were(tiny_model, make_experts) -> None:
    model = tiny_model("llama")
    bank = make_experts(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    factors = {(name, target): bank[name].targets[target].a.clone() for name in bank.names for target in bank.targets}
    ids = torch.randint(3, 67, (2, 7))
    with torch.no_grad():
        bare = model(input_ids=ids).logits
    goat = attach(model, Bank.from_adapters(experts_for("goat", model)), trainable=True)
    routed = build(goat, preset("goat"))
    with torch.no_grad():
        assert (routed(input_ids=ids).logits - bare).abs().max() > 1e-3
        with routed.disable():
            assert torch.equal(model(input_ids=ids).logits, bare)
    goat.detach()
    less_general = Bank.from_adapters(subtract_general([bank[name] for name in bank.names], [bank[bank.names[0]]]))
    with attach(model, less_general) as attached:
        build(attached, preset("arrow"))
        with torch.no_grad():
            assert (model(input_ids=ids).logits - bare).abs().max() > 1e-3
    assert model.state_dict().keys() == before.keys()
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []
    assert all(torch.equal(bank[name].targets[target].a, a) for (name, target), a in factors.items())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, bare)


@pytest.mark.parametrize("name", ["arrow", "spectr", "smile", "logo"])
def test_training_free_gates_depend_on_deltas_alone(name, tiny_model, make_experts) -> None:
    """The same bank under another global seed to the bit; the same deltas from other factors up to rounding."""
    model = tiny_model("llama")
    bank = make_experts(model)
    ids = torch.randint(3, 67, (2, 7))

    def scores(bank: Bank, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with attach(model, bank) as attached:
            routed = build(attached, preset(name))
            with torch.no_grad(), routed.recording() as decisions:
                model(input_ids=ids)
            return torch.cat([each.logits_NE for each in decisions])

    first = scores(bank, 1)
    assert torch.equal(scores(bank, 2), first)
    generator = torch.Generator().manual_seed(3)
    others = []
    for expert in (bank[each] for each in bank.names):
        updates = {}
        for target, one in expert.targets.items():
            change = torch.linalg.qr(torch.randn(one.rank, one.rank, generator=generator)).Q * -2
            updates[target] = LowRank(change @ one.a, one.b @ torch.linalg.inv(change), one.scaling)
        others.append(Adapter(expert.name, expert.base, updates))
    torch.testing.assert_close(scores(Bank.from_adapters(others), 1), first, rtol=1e-3, atol=1e-4)


BALANCED = MixtureSpec(
    gate=LinearGate(init="normal", std=0.5), select=TopK(k=2), renormalise="sum",
    losses=(SwitchLoadBalance(coefficient=0.5),),
)  # fmt: skip


def test_losses_have_gradients_where_inputs_have_none_and_count_once_under_checkpointing(routed_over, batch) -> None:
    """Nothing below the first gate trains, so its input needs no gradient; layers that run twice decide once."""
    values, gradients = [], []
    for checkpointing in (False, True):
        routed = routed_over("llama", BALANCED).train()
        if checkpointing:
            routed.gradient_checkpointing_enable()
        with routed.recording(inputs=True) as decisions:
            output = routed(**batch("llama"))
        output.loss.backward()
        assert len(decisions) == len(routed.router.layout)
        assert checkpointing or not decisions[0].x_ND.requires_grad
        parameters = routed.trained_parameters()
        values.append(output.aux_loss.detach())
        gradients.append({name: parameter.grad for name, parameter in parameters.items()})
        if not checkpointing:
            again = routed(**batch("llama")).aux_loss
            alone = torch.autograd.grad(again, list(parameters.values()))
            assert min(float(each.abs().max()) for each in alone) > 0
        routed.attached.detach()
    torch.testing.assert_close(values[0], values[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_experts_that_nobody_chooses_have_gradients_of_zero(routed_over, batch) -> None:
    """Zeros and not None: processes of which one chooses an expert and one does not reduce the same tensors."""
    spec = MixtureSpec(gate=LinearGate(init="zeros", bias=True), select=Argmax(), train="both")
    routed = routed_over("llama", spec).train()
    with torch.no_grad():
        for name, parameter in routed.named_parameters():
            if name.startswith("router.") and "bias" in name:
                parameter[0] = 50.0
    routed(**batch("llama")).loss.backward()
    assert [name for name, each in routed.trained_parameters().items() if each.grad is None] == []
    for layer in routed.attached.layers.values():
        own = layer.stack.offsets[1]
        assert layer.a_RD.grad[:own].abs().max() > 0
        assert layer.a_RD.grad[own:].abs().max() == 0
        assert layer.b_RO.grad[own:].abs().max() == 0
