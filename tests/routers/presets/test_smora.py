"""SMoRA gates the ranks of one LoRA (arXiv:2501.15103)."""

import torch

from compose.routers.balance import SelectionBalance
from compose.routers.presets.registry import PRESETS, preset
from compose.routers.selectors.top_k import TopK


def test_ranks_are_gated_one_by_one(small) -> None:
    mixture = small(preset("smora", select=TopK(k=3, selection_bias=True)), experts=8, rank=1)
    output = mixture.run()
    x, stack = mixture.read(), mixture.attached.layers["layers.0.mlp.up_proj"].stack
    probs = torch.softmax(x @ mixture.gate.weight_ED.detach().double().T, -1)
    g = probs.masked_fill(probs < probs.topk(3, dim=-1).values[..., -1:], 0.0)
    a_RD, b_RO = stack.a_RD.detach(), stack.b_RO.detach()
    torch.testing.assert_close(
        output, mixture.base() + 3.0 * (g * (x @ a_RD.T)) @ b_RO, rtol=1e-6, atol=1e-6  # B diag(g) A x
    )  # fmt: skip


def test_the_bias_moves_the_choice_and_no_gate(small) -> None:
    mixture = small(preset("smora", select=TopK(k=1, selection_bias=True)), experts=8, rank=1)
    balance = SelectionBalance(
        {name: mixture.routed.router.site(name) for name in mixture.routed.router.layout}, rate=1.0
    )
    with torch.no_grad(), mixture.routed.recording() as decisions:
        mixture.run()
    before = decisions[0]
    balance.observe(decisions)
    balance.step()
    with torch.no_grad(), mixture.routed.recording() as decisions:
        mixture.run()
    after = decisions[0]
    torch.testing.assert_close(after.probs_NE, before.probs_NE, rtol=0, atol=0)
    assert not torch.equal(after.gates_NE > 0, before.gates_NE > 0)
    chosen = after.gates_NE > 0
    torch.testing.assert_close(after.gates_NE[chosen], after.probs_NE[chosen], rtol=0, atol=0)


def test_every_expert_is_one_rank() -> None:
    assert (PRESETS["smora"].experts.num_experts, PRESETS["smora"].experts.rank) == (64, 1)
