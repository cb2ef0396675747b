"""extract: an exact low-rank change comes back, any change in its best form, and what is left out is named."""

import copy

import pytest
import torch
from torch.testing import assert_close

import compose
from compose.errors import IncompatibleError

IDS = torch.tensor([[5, 9, 11, 3]])


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_merged_adapter_is_extracted_again(tiny_model, make_bank, name) -> None:
    base = tiny_model(name)
    bank = make_bank(base)
    tuned = copy.deepcopy(base)
    merged = compose.merge(bank, weights=[0.5, 0.0, 0.2, 0.0])
    merged.merge_into(tuned)
    found = compose.extract(tuned, base, energy=1 - 1e-9)
    assert set(found.adapter.targets) == set(merged.adapter.targets)
    assert found.left_out == ()
    for target, update in merged.adapter.targets.items():
        assert_close(found.adapter.targets[target].delta(), update.delta(), atol=1e-4, rtol=1e-3)
        assert found.adapter.targets[target].rank <= update.rank


def test_a_full_change_is_cut_at_the_best_rank_and_the_rest_is_named(tiny_model) -> None:
    base = tiny_model("llama")
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    found = compose.extract(tuned, base, rank=4, targets=["*.q_proj", "model.embed_tokens"])
    assert {target.split(".")[-1] for target in found.adapter.targets} == {"q_proj", "embed_tokens"}
    assert "model.norm.weight" in found.left_out
    target = "model.layers.0.self_attn.q_proj"
    change = (tuned.get_submodule(target).weight - base.get_submodule(target).weight).detach()
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    assert_close(found.adapter.targets[target].delta(), u[:, :4] * s[:4] @ v[:4], atol=1e-5, rtol=1e-4)
    assert found.errors[target] == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-4)
    with compose.attach(base, compose.Bank.from_adapters([found.adapter])) as attached:
        attached.set("extracted")
        assert base(IDS).logits.isfinite().all()


def test_what_cannot_be_extracted_is_refused(tiny_model) -> None:
    base, other = tiny_model("llama"), tiny_model("gpt2")
    with pytest.raises(IncompatibleError, match="rank >= 1"):
        compose.extract(base, base)
    with pytest.raises(IncompatibleError, match="nothing changed"):
        compose.extract(copy.deepcopy(base), base, rank=2)
    with pytest.raises(IncompatibleError, match="differ in"):
        compose.extract(other, base, rank=2)
    with pytest.raises(IncompatibleError, match="matches no layer"):
        compose.extract(copy.deepcopy(base), base, rank=2, targets=["*.zzz"])
