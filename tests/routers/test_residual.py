"""What experts were at the start is subtracted as a mean, for mixed ranks and missing experts."""

import torch

from compose.engine.attach import attach
from compose.engine.coefficients import LayerCall
from compose.routers.builder import build
from compose.routers.residual import StartResidual
from compose.routers.spec import MixtureSpec


def test_mean_of_the_experts_that_exist(tiny_model, make_experts) -> None:
    model = tiny_model("llama").double()
    attached = attach(model, make_experts(model, skip="layers.0"), trainable=True)
    target = "model.layers.0.mlp.up_proj"
    layer = attached.layers[target]
    residual = StartResidual(layer)
    x, base = torch.randn(2, 3, 32, dtype=torch.float64), torch.randn(2, 3, 48, dtype=torch.float64)
    call = LayerCall(layer.stack, base, target, "auto", owns_base=False)
    present = [
        attached.bank[name].targets[target].delta().double() for name in attached.bank.names if name != "expert-1"
    ]
    expected = base - x @ (sum(present) / 3).T
    torch.testing.assert_close(residual(x, call), expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        layer.a_RD.mul_(2.0)  # trained factors are not what was subtracted
    torch.testing.assert_close(residual(x, call), expected, rtol=1e-6, atol=1e-6)


def test_it_is_built_where_the_specification_says(tiny_model, make_experts) -> None:
    model = tiny_model("llama")
    attached = attach(model, make_experts(model), trainable=True)
    routed = build(attached, MixtureSpec(train="both", subtract_start=True))
    assert len(routed.mixer.residuals) == len(attached.layers)
    assert not list(routed.mixer.parameters())
    routed.remove()
    assert not build(attached, MixtureSpec(train="both")).mixer.residuals
