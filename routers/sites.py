"""Sites: where gates live. Targets of one site share one gate network.

| site | one gate for | read from the module paths |
| --- | --- | --- |
| ``model`` | everything (encoder and decoder apart) | |
| ``block`` | a decoder or encoder layer | the path up to the first number |
| ``block_part`` | its attention, or its feed-forward part | "attn" or "attention" in the rest of the path |
| ``group`` | q/k/v, o, up/gate, or down of one module | the last name |
| ``linear`` | one target | |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from compose.errors import IncompatibleError, UnknownNameError

SiteKind = Literal["model", "block", "block_part", "group", "linear"]
SITE_KINDS = ("model", "block", "block_part", "group", "linear")

_GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj", "query", "key", "value", "q", "k", "v", "c_attn", "Wqkv"),
    "upgate": ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "wi", "wi_0", "wi_1", "c_fc", "fc1"),
}
_CROSS = re.compile(r"(EncDecAttention|crossattention|encoder_attn|cross_attn)")


class Site(NamedTuple):
    """One place with a gate.

    Attributes:
        name: The path the targets share, with what tells sites apart behind a colon.
        body: Path of the module that holds the layers.
        block: Path of the layer, ``""`` for a site of the whole model.
        layer: Layer number, -1 for a site of the whole model.
        targets: In module order. The first is the leader: where a gate reads layer inputs, it reads the leader's.
    """

    name: str
    body: str
    block: str
    layer: int
    targets: tuple[str, ...]

    @property
    def leader(self) -> str:
        """The first target."""
        return self.targets[0]


def block_path(target: str) -> str:
    """The path up to the first layer number (``model.layers.3``); the whole path where there is none."""
    found = re.match(r".*?\.\d+(?=\.|$)", target)
    return found.group(0) if found else target


def body_path(target: str) -> str:
    """Path of the module that holds the layers: ``model`` for ``model.layers.3.mlp.up_proj``; ``""``: none known."""
    block = block_path(target)
    return ".".join(block.split(".")[:-2]) if block != target else ""


def layer_number(target: str) -> int:
    """The first number in the path; -1 where there is none."""
    block = block_path(target)
    return int(block.rsplit(".", 1)[1]) if block != target else -1


def is_attention(target: str) -> bool:
    """Whether a target belongs to the attention part of its layer."""
    rest = target[len(block_path(target)) :] or target
    return re.search(r"attn|attention", rest, re.IGNORECASE) is not None


def reads_encoder(target: str) -> bool:
    """Whether a target's input are the encoder's tokens though it stands in the decoder (keys, values)."""
    keys_or_values = target.rsplit(".", 1)[-1] in ("k", "v", "k_proj", "v_proj", "key", "value")
    return keys_or_values and _CROSS.search(target) is not None


def make_sites(targets: Sequence[str], kind: SiteKind) -> dict[str, Site]:
    """Cut targets into sites.

    Args:
        targets: In module order.
        kind: See the module.

    Returns:
        Name -> site, in order of the first target.

    Raises:
        UnknownNameError: No such kind.
        IncompatibleError: No targets.
    """
    if kind not in SITE_KINDS:
        raise UnknownNameError(f"unknown site {kind!r}; known: {', '.join(SITE_KINDS)}")
    if not targets:
        raise IncompatibleError("there are no targets to route; the pattern of targets matches nothing in the bank")
    members: dict[str, list[str]] = {}
    for target in targets:
        members.setdefault(_site_name(target, kind), []).append(target)
    return {name: _site(name, kind, group) for name, group in members.items()}


def _site(name: str, kind: SiteKind, targets: list[str]) -> Site:
    if kind == "model":
        return Site(name, body_path(targets[0]), "", -1, tuple(targets))
    return Site(name, body_path(targets[0]), block_path(targets[0]), layer_number(targets[0]), tuple(targets))


def _site_name(target: str, kind: SiteKind) -> str:
    if kind == "model":
        return f"{body_path(target) or 'model'}:model"
    if kind == "block":
        return block_path(target)
    if kind == "block_part":
        return f"{block_path(target)}:{'attention' if is_attention(target) else 'feed_forward'}"
    if kind == "group":
        parent, _, leaf = target.rpartition(".")
        group = next((group for group, leaves in _GROUPS.items() if leaf in leaves), leaf)
        return f"{parent}:{group}"
    return target
