"""Fresh experts for mixtures that train theirs, as adapters of a bank, and experts that are no low-rank factors.

Shape letters: ``E`` experts, ``r`` rank of one expert, ``D`` in, ``O`` out.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from compose.adapter import Adapter, LowRank
from compose.errors import IncompatibleError
from compose.routers.sites import layer_number

ExpertInit = Literal["kaiming", "normal", "kaiming_both", "tied", "segments", "empty"]
ScalingRule = Literal["alpha", "rslora", "width"]
_INITS = get_args(ExpertInit)


def fresh_experts(  # noqa: PLR0913 - one parameter per choice of how experts start
    model: Any,
    targets: Sequence[str],
    *,
    num_experts: int | Sequence[int],
    rank: int,
    alpha: float | None = None,
    scaling: ScalingRule = "alpha",
    init: ExpertInit = "kaiming",
    std: float = 0.02,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> list[Adapter]:
    """Return untrained adapters for ``Bank.from_adapters``.

    The values of one factor are drawn from (seed, expert, target) alone, whatever else is made.

    Args:
        model: Its modules give the widths.
        targets: Paths of linear layers.
        num_experts: ``E``, or one number per equal part of the depth (MoLA's 2-4-6-8): expert ``e`` then has factors
            in the layers that have more than ``e`` experts.
        rank: ``r`` of every expert.
        alpha: See ``scaling``; None: alpha equals the rank.
        scaling: ``"alpha"``: alpha / rank; ``"rslora"``: alpha / sqrt(rank); ``"width"``: sqrt(3 alpha D / rank),
            GOAT's rule, whose eta is alpha here.
        init: Of A; B is zero unless said otherwise. ``"kaiming"`` (uniform, a = sqrt 5); ``"normal"``;
            ``"kaiming_both"``: B too (MultiLoRA); ``"tied"``: kaiming, the same A for all experts (shared A);
            ``"segments"``: A and B from segments of the weight's spectrum (`compose.routers.segments`), with a smaller
            rank at targets whose segments hold fewer than ``r`` singular values;
            ``"empty"``: rank 0 (the experts are something else and the bank only names them).
        std: Of ``"normal"``.
        seed: See above.
        names: Names of the experts; ``expert_0`` ... by default.

    Raises:
        IncompatibleError: Numbers out of range, or a target that is no linear layer of the model.
    """
    if init not in _INITS or rank < 1:
        raise IncompatibleError(f"init must be one of {', '.join(_INITS)} and rank >= 1, got {init!r}, {rank}")
    widths = {target: linear_widths(model, target) for target in targets}
    counts = _counts(targets, num_experts)
    most = max(counts.values(), default=0)
    if most < 1 or (names is not None and len(names) != most):
        raise IncompatibleError(f"num_experts must be at least 1 and names as many, got {num_experts}, {names}")
    factor = float(rank if alpha is None else alpha)
    scalings = {target: _scaling(scaling, factor, rank, width) for target, (width, _) in widths.items()}
    if init == "segments":
        made = {target: _segments(model, target, count, rank, scaling, factor) for target, count in counts.items()}
    else:
        made = {
            target: [
                _factors(widths[target], rank, scalings[target], init, std, (seed, 0 if init == "tied" else e, target))
                for e in range(counts[target])
            ]
            for target in targets
        }
    return [
        Adapter(
            f"expert_{index}" if names is None else names[index],
            "",
            {target: updates[index] for target, updates in made.items() if index < len(updates)},
        )
        for index in range(most)
    ]


def base_weight(model: Any, target: str) -> torch.Tensor:
    """Weight ``(O, D)`` of a linear layer, GPT-2's ``Conv1D`` included; detached, not copied.

    Raises:
        IncompatibleError: No such linear layer, or its weight is quantised.
    """
    linear_widths(model, target)
    module = model.get_submodule(target)
    module = getattr(module, "base_layer", module)
    weight: torch.Tensor = module.weight.detach()
    if not weight.is_floating_point():
        raise IncompatibleError(
            f"{target}: its weight is quantised ({weight.dtype}), so it has no spectrum to start from"
        )
    return weight.T if type(module).__name__ == "Conv1D" else weight


def linear_widths(model: Any, target: str) -> tuple[int, int]:
    """Input and output width of a linear layer, GPT-2's ``Conv1D`` included.

    Raises:
        IncompatibleError: No such module, or it is no linear layer.
    """
    try:
        module = model.get_submodule(target)
    except AttributeError:
        raise IncompatibleError(f"the model has no module {target!r}") from None
    module = getattr(module, "base_layer", module)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        raise IncompatibleError(f"{target!r} is a {type(module).__name__}, experts stand on linear layers")
    return int(module.in_features), int(module.out_features)


def linear_targets(model: Any) -> list[str]:
    """Paths of all linear layers inside numbered blocks: what adapters usually stand on, in module order."""
    found = []
    for path, module in model.named_modules():
        linear = hasattr(module, "in_features") and hasattr(module, "out_features")
        conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if (linear or conv1d) and layer_number(path) >= 0:
            found.append(path)
    return found


def check_experts(bank: Any) -> None:
    """Refuse a bank whose adapters do more than low-rank updates of linear layers.

    Raises:
        IncompatibleError: It names every such adapter and what it has.
    """
    problems = []
    for name in bank.names:
        adapter = bank[name]
        config: Mapping[str, Any] = adapter.config
        extra = [f"modules_to_save {key!r}" for key in list(adapter.full_modules)[:1]]
        if config.get("use_dora"):
            extra.append("DoRA magnitudes")
        if config.get("bias", "none") not in ("none", None):
            extra.append(f"trained biases ({config['bias']!r})")
        extra += [f"an embedding at {key!r}" for key, update in adapter.targets.items() if update.kind != "linear"][:1]
        if extra:
            problems.append(f"{name}: {', '.join(extra)}")
    if problems:
        raise IncompatibleError(
            "experts of a mixture are low-rank updates of linear layers; these adapters hold more:\n  "
            + "\n  ".join(problems)
            + "\nconvert them (compose convert) or leave them out"
        )


def _scaling(rule: ScalingRule, alpha: float, rank: int, width: int) -> float:
    if rule not in get_args(ScalingRule):
        raise IncompatibleError(f"scaling must be one of {', '.join(get_args(ScalingRule))}, got {rule!r}")
    if rule == "width":
        return math.sqrt(3 * alpha * width / rank)
    return alpha / (rank if rule == "alpha" else math.sqrt(rank))


def _segments(model: Any, target: str, num_experts: int, rank: int, rule: ScalingRule, alpha: float) -> list[LowRank]:
    from compose.routers.segments import spectrum_segments  # it reads weights through this module

    widths = linear_widths(model, target)
    rank = max(1, min(rank, min(widths) // num_experts))
    scaling = _scaling(rule, alpha, rank, widths[0])
    return spectrum_segments(model, target, num_experts=num_experts, rank=rank, scaling=scaling)


def _counts(targets: Sequence[str], num_experts: int | Sequence[int]) -> dict[str, int]:
    if isinstance(num_experts, int):
        return dict.fromkeys(targets, num_experts)
    layers = 1 + max((layer_number(target) for target in targets), default=0)
    parts = list(num_experts)
    return {target: parts[max(0, layer_number(target)) * len(parts) // layers] for target in targets}


def _factors(
    widths: tuple[int, int], rank: int, scaling: float, init: ExpertInit, std: float, key: tuple[int, int, str]
) -> LowRank:
    width, out = widths
    if init == "empty":
        return LowRank(torch.zeros(0, width), torch.zeros(out, 0), 1.0)
    seed, expert, target = key
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{expert}/{target}".encode()))
    normal = init == "normal"
    a = torch.randn(rank, width, generator=generator) * std if normal else _kaiming(rank, width, generator)
    b = _kaiming(out, rank, generator) if init == "kaiming_both" else torch.zeros(out, rank)
    return LowRank(a, b, scaling)


def _kaiming(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    bound = 1 / math.sqrt(width)
    return (torch.rand(rows, width, generator=generator) * 2 - 1) * bound
