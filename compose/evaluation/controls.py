"""Ablations of a router: gates that know nothing, and gates of another input.

Shape letters: ``B`` rows, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from compose.routers.router import Router
from compose.routers.routing import Routing

Transform = Callable[[str, Routing], Routing]


def random_gates(router: Router, seed: int) -> Transform:
    """Every decision's gates in random order over the experts of its site: the same sharpness, no knowledge.

    The order is drawn anew for every decision (token or sequence), from ``seed`` and the number of calls so far.
    """
    generator = torch.Generator().manual_seed(seed)

    def transform(site: str, routing: Routing) -> Routing:
        available_E = router.site(site).available_E
        gates = routing.dense().unflatten(-1, (-1, len(available_E)))  # one set, or one per split
        here = available_E.nonzero().squeeze(-1)
        keys = torch.rand(*gates.shape[:-1], len(here), generator=generator).to(gates.device)
        mixed = gates.index_select(-1, here).gather(-1, keys.argsort(-1))
        return routing._replace(gates=gates.index_copy(-1, here, mixed).flatten(-2), expert_ids=None)

    return transform


def gates_of_other_rows() -> Transform:
    """Every row gets the gates of the row half a batch away: right sharpness and experts in use, wrong input.

    Gates that do not differ between rows stay as they are, and so do those of a batch of one row.
    """

    def transform(site: str, routing: Routing) -> Routing:
        if routing.gates.dim() < 2:
            return routing
        shift = routing.gates.shape[0] // 2
        ids = None if routing.expert_ids is None else routing.expert_ids.roll(shift, 0)
        return routing._replace(gates=routing.gates.roll(shift, 0), expert_ids=ids)

    return transform
