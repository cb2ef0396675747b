"""A router's gates averaged per task: what it amounts to when the task is told and the tokens are not looked at.

Shape letters: ``B`` rows, ``E`` experts, ``G`` sites, ``N`` items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from compose.evaluation.around import prompt_columns
from compose.fewshot.loading import LoadedModel
from compose.fewshot.scoring import ScoredBatch
from compose.routers.routed import RoutedModel
from compose.text.encoding import Encoded, encode, pad
from compose.text.examples import Example

ROWS = 32
"""Rows that are run in one batch."""


class TaskGates(NamedTuple):
    """Mean gates.

    Attributes:
        values_GTE: ``(G + 1, tasks, E)`` float32; the last line holds zeros.
        groups: Target -> site number; the last for targets without a gate.
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
    """
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
            told["prompt_mask"] = prompt_columns(ScoredBatch(tuple(places), rows, left=False))
        task_ids = torch.tensor([tasks[place] for place in places])
        told.setdefault("task_ids", task_ids.to(routed.device))
        with routed.recording() as decisions:
            routed(**_inputs(loaded, rows, encoder_decoder), **told)
        for each in decisions:
            place, real_N = sites[each.site], each.real_N.cpu()
            numbers_N = each.tasks_N.cpu()[real_N]
            if (numbers_N < 0).any():  # static gates decide once for the whole batch
                numbers_N, gates = task_ids, each.gates_NE.double().cpu().expand(len(task_ids), -1)
            else:
                gates = each.gates_NE.double().cpu()[real_N]
            sums[place].index_add_(0, numbers_N, gates)
            counts[place].index_add_(0, numbers_N, torch.ones(len(numbers_N), 1, dtype=torch.float64))
    means = torch.cat([sums / counts.clamp_min(1), torch.zeros(1, num_tasks, experts, dtype=torch.float64)])
    site_of = routed.router.site_of
    groups = {target: sites.get(site_of.get(target, ""), len(sites)) for target in routed.attached.layers}
    return TaskGates(means.float(), groups)


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
