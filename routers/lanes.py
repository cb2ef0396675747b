"""Lanes: what the calls of one target have in common, looked up once for a router and its model."""

from __future__ import annotations

from typing import NamedTuple

from compose.routers.router import Router
from compose.routers.sites import Site, reads_encoder

BODY_INPUTS = ("embeddings", "first_pass", "tap")
"""Inputs of gates that are known before any layer runs."""


class Lane(NamedTuple):
    """One target's calls.

    Attributes:
        site: The target's site.
        alone: Whether the site has no other target.
        decides: Whether the gate reads this target's input.
        keeps: Whether what is decided here is for the site's other targets too.
        of_encoder: Whether it reads the encoder's tokens though it stands in the decoder.
    """

    site: Site
    alone: bool
    decides: bool
    keeps: bool
    of_encoder: bool


def lane_of(router: Router, target: str) -> Lane:
    """Return the lane of a routed target."""
    site, spec = router.layout[router.site_of[target]], router.spec
    of_encoder = reads_encoder(target)
    encoder_tokens = of_encoder and spec.scope == "token"
    reads_layers = spec.gate_input not in (*BODY_INPUTS, "block")
    decides = encoder_tokens or (target == site.leader and reads_layers)
    return Lane(site, len(site.targets) == 1, decides, not encoder_tokens, of_encoder)
