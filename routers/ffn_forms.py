"""Feed-forward parts of Transformers models: which linear layers they have and what stands between them.

| form | modules | models |
| --- | --- | --- |
| gated | ``down(act(gate x) * up x)`` | Llama, Mistral, Qwen, Gemma; T5 1.1 (``wi_0``, ``wi_1``, ``wo``) |
| plain | ``down(act(up x))`` | T5 (``wi``, ``wo``), GPT-2 (``c_fc``, ``c_proj``), Phi (``fc1``, ``fc2``) |
| split | ``intermediate.dense``, ``output.dense`` | BERT: two modules, with residual and normalisation in the second |

A part is taken for one of these only if it computes the same on a random input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.sites import Site


class FfnParts(NamedTuple):
    """The pieces of a part, in the order they run.

    Attributes:
        gate: The linear layer whose output is activated and multiplied; None in plain forms.
        up: The other first layer.
        act: Activation.
        inner: Dropout before the last layer.
        down: The last layer.
        outer: Dropout after it.
    """

    gate: Any
    up: Any
    act: Callable[[torch.Tensor], torch.Tensor]
    inner: Callable[[torch.Tensor], torch.Tensor]
    down: Any
    outer: Callable[[torch.Tensor], torch.Tensor]


class Found(NamedTuple):
    """A part in a model.

    Attributes:
        path: Path of its module, the first one where there are two.
        first: The module.
        second: Path and module of the second half; None where there is one module.
        parts: Its pieces.
    """

    path: str
    first: nn.Module
    second: tuple[str, nn.Module] | None
    parts: FfnParts


class _Form(NamedTuple):
    gate: str
    up: str
    down: str
    act: str
    inner: str = ""
    outer: str = ""


_FORMS = (
    _Form("gate_proj", "up_proj", "down_proj", "act_fn"),
    _Form("wi_0", "wi_1", "wo", "act", inner="dropout"),
    _Form("", "wi", "wo", "act", inner="dropout"),
    _Form("", "c_fc", "c_proj", "act", outer="dropout"),
    _Form("", "fc1", "fc2", "activation_fn"),
)


def find_parts(attached: Any, site: Site) -> Found:
    """Return the feed-forward part that a site's targets belong to.

    Raises:
        IncompatibleError: It is of no known form, or does not compute what its form says.
    """
    model = attached.model
    paths = list(dict.fromkeys(target.rpartition(".")[0] for target in site.targets))
    leaves = {path.rpartition(".")[2] for path in paths}
    if leaves <= {"intermediate", "output"}:
        return _bert(attached, site, paths[0].rpartition(".")[0])
    if len(paths) > 1:
        raise IncompatibleError(f"{site.name}: its targets lie in {len(paths)} modules ({', '.join(paths)}); {_KNOWN}")
    module = model.get_submodule(paths[0])
    children = dict(module.named_children())
    for form in _FORMS:
        linears = [name for name in (form.gate, form.up, form.down) if name]
        others = set(children) - set(linears) - {form.act, form.inner, form.outer}
        if all(name in children for name in linears) and not others and hasattr(module, form.act):
            found = Found(paths[0], module, None, _parts(module, form))
            _verify(attached, site, found, lambda x: module(x))
            return found
    raise IncompatibleError(
        f"{site.name}: {type(module).__name__} with {', '.join(children)} is no feed-forward part that experts can "
        f"stand in for; {_KNOWN}"
    )


_KNOWN = "known are those of Llama, T5, GPT-2, Phi and BERT. The preset 'mixlora_lin' mixes any linear layers"


def _parts(module: nn.Module, form: _Form) -> FfnParts:
    return FfnParts(
        gate=getattr(module, form.gate) if form.gate else None,
        up=getattr(module, form.up),
        act=getattr(module, form.act),
        inner=getattr(module, form.inner) if form.inner else nn.Identity(),
        down=getattr(module, form.down),
        outer=getattr(module, form.outer) if form.outer else nn.Identity(),
    )


def _bert(attached: Any, site: Site, block: str) -> Found:
    names = [f"{block}.intermediate", f"{block}.output"]
    try:
        first, second = (attached.model.get_submodule(name) for name in names)
        parts = FfnParts(
            None, first.dense, first.intermediate_act_fn, nn.Identity(), second.dense, second.dropout,
        )  # fmt: skip
        norm = second.LayerNorm
    except AttributeError as error:
        raise IncompatibleError(
            f"{site.name}: {block} is not built as BERT's layers are ({error}); {_KNOWN}"
        ) from None
    found = Found(names[0], first, (names[1], second), parts)
    _verify(attached, site, found, lambda x: second(first(x), x), lambda y, x: norm(y + x))
    return found


def _verify(
    attached: Any,
    site: Site,
    found: Found,
    original: Callable[[torch.Tensor], torch.Tensor],
    finish: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda y, _: y,
) -> None:
    """Raise unless the part, without experts and dropout, computes what its pieces do."""
    parts, modules = found.parts, [found.first, *(found.second or ())[1:]]
    weight = parts.up.weight
    width = attached.layers[site.leader].a_RD.shape[1]
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    modes = [(each, each.training) for module in modules for each in module.modules()]
    try:
        for each, _ in modes:
            each.training = False
        with torch.no_grad(), attached.using(None):
            wanted = original(x)
            z = parts.act(parts.up(x)) if parts.gate is None else parts.act(parts.gate(x)) * parts.up(x)
            down_dtype = parts.down.weight.dtype
            got = finish(parts.down(z.to(down_dtype) if down_dtype.is_floating_point else z).to(x.dtype), x)
    finally:
        for each, mode in modes:
            each.training = mode
    if wanted.shape != got.shape or not torch.allclose(wanted.to(got.dtype), got, rtol=1e-2, atol=1e-3):
        raise IncompatibleError(f"{site.name}: {type(found.first).__name__} computes something else; {_KNOWN}")
