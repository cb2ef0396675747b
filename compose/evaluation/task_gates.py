"""A router's gates averaged per task: what it amounts to when the task is told and the tokens are not looked at.

Shape letters: ``B`` rows, ``E`` experts, ``G`` sites, ``N`` items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from compose.errors import IncompatibleError
from compose.evaluation.around import prompt_columns
from compose.fewshot.loading import LoadedModel
from compose.fewshot.scoring import ScoredBatch
from compose.routers.context import RoutingContext
from compose.routers.routed import RoutedModel
from compose.routers.routing import Decisions, Routing
from compose.routers.steps import Seen
from compose.text.encoding import Encoded, encode, pad
from compose.text.examples import Example

ROWS = 32
"""Rows that are run in one batch."""


class TaskGates(NamedTuple):
    """Mean gates.

    Attributes:
        values_GTE: ``(G, tasks, E)`` float32, as they are applied: what an expert without factors at a target would
            get is shared out there as the mixture says. The last line holds zeros.
        groups: Target -> its line; the last for targets without a gate.
    """

    values_GTE: torch.Tensor
    groups: dict[str, int]

    def rows(self, tasks: Sequence[int]) -> torch.Tensor:
        """``(G, N, E)`` for items of these tasks."""
        return self.values_GTE[:, list(tasks)]


@torch.no_grad()
def task_gates(
    routed: RoutedModel,
    loaded: LoadedModel,
    items: Sequence[Example],
    tasks: Sequence[int],
    *,
    num_tasks: int,
    said: Mapping[str, torch.Tensor],
) -> TaskGates:
    """Average the gates of every site over all real tokens (or sequences) of a task's items, responses included.

    Args:
        routed: The mixture.
        loaded: The model it stands on.
        items: Examples that are not tested on.
        tasks: Task number of each.
        num_tasks: How many tasks there are.
        said: What the router is told of every item; see ``compose.evaluation.around.routed_rows``.

    Raises:
        IncompatibleError: The mixture is not what coefficients of a bank's adapters can say.
    """
    _check_says(routed)
    sites = {name: index for index, name in enumerate(routed.router.layout)}
    experts = len(routed.router.experts)
    sums = torch.zeros(len(sites), num_tasks, experts, dtype=torch.float64)
    counts = torch.zeros(len(sites), num_tasks, 1, dtype=torch.float64)
    encoder_decoder = loaded.model.config.is_encoder_decoder
    encoded = encode(items, loaded.tokenizer, loaded.prompt_format, encoder_decoder=encoder_decoder)
    for start in range(0, len(encoded), ROWS):
        places = range(start, min(start + ROWS, len(encoded)))
        rows = tuple(encoded[place] for place in places)
        told = {name: values[list(places)].to(routed.device) for name, values in said.items()}
        if not encoder_decoder:
            told["prompt_mask"] = prompt_columns(ScoredBatch(tuple(places), rows, left=False)).to(routed.device)
        tasks_B = torch.tensor([tasks[place] for place in places])
        with routed.recording() as decisions:
            routed(**_inputs(loaded, rows, encoder_decoder), **told)
        for each in decisions:
            numbers_N, gates_NE = _by_task(each, tasks_B)
            place = sites[each.site]
            sums[place].index_add_(0, numbers_N, gates_NE)
            counts[place].index_add_(0, numbers_N, torch.ones(len(numbers_N), 1, dtype=torch.float64))
    means = dict(zip(sites, (sums / counts.clamp_min(1)).float(), strict=True))
    return _applied(routed, {**means, **_constant(routed, num_tasks)})


def _check_says(routed: RoutedModel) -> None:
    spec = routed.spec
    if spec.structure != "lora" or spec.splits > 1 or spec.subtract_start:
        raise IncompatibleError(
            "its experts are more than low-rank factors of a bank, so mean gates cannot be put into force as "
            "coefficients"
        )


def _constant(routed: RoutedModel, num_tasks: int) -> dict[str, torch.Tensor]:
    """Gates ``(tasks, E)`` of sites that have always-on experts alone: nothing is decided there."""
    names = [name for name in routed.router.layout if routed.router.site(name).constant]
    nothing = Seen(None, None, None, None, RoutingContext(), False)
    return {name: routed.router(name, nothing).gates.float().cpu().expand(num_tasks, -1) for name in names}


def _by_task(decisions: Decisions, tasks_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Task number and gates of every real decision; gates that the whole batch shares count for each row."""
    gates_NE = decisions.gates_NE.double().cpu()
    if len(gates_NE) == 1 or decisions.rows_N is None:
        return tasks_B, gates_NE.expand(len(tasks_B), -1)
    real_N = decisions.real_N.cpu()
    return tasks_B[decisions.rows_N.cpu()[real_N]], gates_NE[real_N]


def _applied(routed: RoutedModel, means: Mapping[str, torch.Tensor]) -> TaskGates:
    """Mean gates ``(tasks, E)`` by site -> one line per site and set of experts that have factors."""
    lines: dict[tuple[str, tuple[bool, ...]], torch.Tensor] = {}
    places: dict[str, tuple[str, tuple[bool, ...]]] = {}
    for target, layer in routed.attached.layers.items():
        if (site := routed.router.site_of.get(target)) is None:
            continue
        key = (site, tuple(rank > 0 for rank in layer.stack.ranks))
        mean_TE = means[site]
        if key not in lines:
            lines[key], _ = routed.mixer.fitted(Routing(mean_TE, None, mean_TE, mean_TE), layer.stack)
        places[target] = key
    numbers = {key: number for number, key in enumerate(lines)}
    zeros = torch.zeros_like(next(iter(means.values())))
    groups = {target: numbers[places[target]] if target in places else len(lines) for target in routed.attached.layers}
    return TaskGates(torch.stack([*lines.values(), zeros]), groups)


def _inputs(loaded: LoadedModel, rows: Sequence[Encoded], encoder_decoder: bool) -> dict[str, torch.Tensor]:
    """Right-padded inputs of prompts with their responses, without labels."""
    device, fill = loaded.model.device, loaded.model.config.pad_token_id or 0
    if not encoder_decoder:
        ids, mask = pad([[*row.prompt, *row.response] for row in rows], fill)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    ids, mask = pad([row.prompt for row in rows], fill)
    labels, label_mask = pad([row.response for row in rows], 0)
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "labels": labels.masked_fill(label_mask == 0, -100).to(device),
    }
