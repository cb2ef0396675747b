"""Calibration: means of what gates read, without padding, in any order; centroids; saved with the router."""

import pytest
import torch

from compose.engine.attach import attach
from compose.errors import IncompatibleError, UnknownNameError
from compose.routers.builder import build
from compose.routers.calibration import calibrate
from compose.routers.gates.proto import ProtoGate
from compose.routers.presets.registry import preset
from compose.routers.saved import load, save


def data_for(routed, batch, name="llama", *, text=0):
    """Two batches of random tokens per expert, the last row of each padded."""
    data = {}
    for number, expert in enumerate(routed.router.experts):
        batches = []
        for part in range(2):
            generator = torch.Generator().manual_seed(10 * number + part)
            inputs = batch(name)
            inputs["input_ids"] = torch.randint(3, 67, inputs["input_ids"].shape, generator=generator)
            if text:
                inputs["text_embedding"] = torch.randn(len(inputs["input_ids"]), text, generator=generator)
            batches.append(inputs)
        data[expert] = batches
    return data


def prototypes(routed):
    return {name: routed.router.site(name).gate.prototypes_EPD.clone() for name in routed.router.layout}


def read(routed, target, batches, selection):
    """What a target reads, token by token, with a selection in force."""
    inputs = []
    layer = routed.attached.layers[target]
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad(), routed.attached.using(selection):
        for each in batches:
            routed.model(**each)
    hook.remove()
    return inputs


@pytest.mark.parametrize("with_expert", [True, False])
@pytest.mark.parametrize("tokens", ["all", "last"])
def test_means_of_the_inputs_of_every_target(with_expert, tokens, routed_over, batch) -> None:
    routed = routed_over("llama", preset("avg_act"))
    data = data_for(routed, batch)
    counts = calibrate(routed, data, tokens=tokens, with_expert=with_expert)
    assert counts == dict.fromkeys(routed.router.experts, 2 * (9 + 9 + 7) if tokens == "all" else 6)
    for target in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        for expert, name in enumerate(routed.router.experts):
            rows = []
            for x, each in zip(
                read(routed, target, data[name], name if with_expert else None), data[name], strict=True
            ):
                for row, mask in zip(x, each["attention_mask"].bool(), strict=True):
                    rows.append(row[mask] if tokens == "all" else row[mask][-1:])
            wanted = torch.cat(rows).double().mean(0).float()
            got = routed.router.site(routed.router.site_of[target]).gate.prototypes_EPD[expert, 0]
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_order_and_batch_sizes_do_not_matter(routed_over, batch) -> None:
    routed = routed_over("llama", preset("avg_act"))
    data = data_for(routed, batch)
    calibrate(routed, data)
    first = prototypes(routed)
    turned = {}
    for name, batches in reversed(data.items()):
        rows = [(each, row) for each in reversed(batches) for row in (2, 0, 1)]
        turned[name] = [{key: value[row : row + 1] for key, value in each.items()} for each, row in rows]
    calibrate(routed, turned)
    for name, value in prototypes(routed).items():
        torch.testing.assert_close(value, first[name], rtol=1e-5, atol=1e-6)  # rounding of single rows


def test_what_padding_holds_does_not_matter(routed_over, batch) -> None:
    routed = routed_over("llama", preset("avg_act"))
    data = data_for(routed, batch)
    calibrate(routed, data)
    first = prototypes(routed)
    for batches in data.values():
        for each in batches:
            each["input_ids"][each["attention_mask"] == 0] = 66
    calibrate(routed, data)
    assert all(torch.equal(value, first[name]) for name, value in prototypes(routed).items())


def test_labels_of_a_decoder_tell_its_padding(routed_over, batch) -> None:
    routed = routed_over("t5", preset("avg_act"))
    data = data_for(routed, batch, "t5")
    calibrate(routed, data)
    target = "decoder.block.1.layer.2.DenseReluDense.wi"
    name = routed.router.experts[0]
    kept = []
    for x, each in zip(read(routed, target, data[name], name), data[name], strict=True):
        kept.append(x[each["labels"] != -100])
    got = routed.router.site(routed.router.site_of[target]).gate.prototypes_EPD[0, 0]
    torch.testing.assert_close(got, torch.cat(kept).double().mean(0).float(), rtol=1e-5, atol=1e-6)


def test_centroids_of_base_features_decide(routed_over, batch) -> None:
    """The expert whose data a prompt comes from is chosen, at full strength."""
    routed = routed_over("llama", preset("color"))
    data = data_for(routed, batch)
    assert calibrate(routed, data) == dict.fromkeys(routed.router.experts, 6)
    for expert, name in enumerate(routed.router.experts):
        with torch.no_grad(), routed.recording() as decisions:
            routed(**data[name][0])
        (decided,) = decisions
        assert decided.gates_NE[:, expert].tolist() == [1.0, 1.0, 1.0]
        assert decided.gates_NE.sum() == 3


def test_texts_need_no_model(routed_over, batch) -> None:
    routed = routed_over("llama", preset("router_retriever"), text_features=5)
    data = {
        name: [{"text_embedding": torch.randn(3, 5, generator=torch.Generator().manual_seed(number))}]
        for number, name in enumerate(routed.router.experts)
    }
    calibrate(routed, data)
    gate = next(iter(routed.router.gates.values())).gate
    torch.testing.assert_close(gate.prototypes_EPD[1, 0], data["expert-1"][0]["text_embedding"].mean(0))
    with pytest.raises(IncompatibleError, match="need text_embedding"):
        calibrate(routed, {"expert-0": [batch("llama")]})


def test_the_model_is_left_as_it_was(routed_over, batch) -> None:
    routed = routed_over("llama", preset("avg_act")).train()
    gates = {name: routed.router.site(name).gate for name in routed.router.layout}
    mixer = routed.session.mixer
    calibrate(routed, data_for(routed, batch))
    assert routed.training
    assert routed.model.training
    assert routed.session.mixer is mixer
    assert all(routed.router.site(name).gate is gate for name, gate in gates.items())
    with pytest.raises(IncompatibleError, match="no data for expert"):
        calibrate(routed, {"expert-0": []})
    assert all(routed.router.site(name).gate is gate for name, gate in gates.items())


def test_prototypes_are_saved_with_the_router(routed_over, batch, tmp_path, tiny_model, make_experts) -> None:
    routed = routed_over("llama", preset("color"))
    inputs = batch("llama")
    with pytest.raises(IncompatibleError, match="no prototypes yet"):
        routed(**inputs)
    calibrate(routed, data_for(routed, batch))
    with torch.no_grad():
        wanted = routed(**inputs).logits
    save(routed, tmp_path / "mixture")
    model = tiny_model("llama")
    loaded = load(attach(model, make_experts(model)), tmp_path / "mixture")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, wanted, rtol=0, atol=0)


def test_a_missing_expert_needs_no_prototype_there(routed_over, batch) -> None:
    routed = routed_over("llama", preset("avg_act"), skip="layers.0")
    data = data_for(routed, batch)
    del data["expert-1"]
    calibrate(routed, data)
    with pytest.raises(IncompatibleError, match=r"layers\.1.*expert-1"):
        routed(**batch("llama"))


def test_wrong_calls_are_refused(routed_over, tiny_model, make_experts, batch) -> None:
    routed = routed_over("llama", preset("avg_act"))
    with pytest.raises(UnknownNameError, match="expert-9"):
        calibrate(routed, {"expert-9": []})
    with pytest.raises(IncompatibleError, match="all or last"):
        calibrate(routed, {}, tokens="first")
    model = tiny_model("llama")
    other = build(attach(model, make_experts(model)), preset("arrow"))
    with pytest.raises(IncompatibleError, match="no gate of this router"):
        calibrate(other, {})
    model = tiny_model("llama")
    trained = build(attach(model, make_experts(model)), preset("arrow", gate=ProtoGate(source="trained")))
    with pytest.raises(IncompatibleError, match="no gate of this router"):
        calibrate(trained, {})
