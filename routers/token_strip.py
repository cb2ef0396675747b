"""TokenStrip: a text with the dominant expert of every token at every site, kept for named examples only.

Shape letters: ``B`` rows, ``T`` tokens, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from compose.errors import IncompatibleError
from compose.routers.routing import Decisions
from compose.routers.site_sums import dominant_expert, gate_shares


class StripLine(NamedTuple):
    """One site of a strip.

    Attributes:
        site: Its name.
        layer: Its layer, -1 for a site of the whole model.
        experts: The dominant expert of every token; -1 where all gates are 0.
        shares: That expert's share of the token's gates.
    """

    site: str
    layer: int
    experts: tuple[int, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TokenStrip:
    """A text and who dominated where.

    Attributes:
        name: Of the example.
        tokens: Texts of the tokens, ``T``.
        prompt_length: How many of them are the prompt.
        task: Name of its task, ``""`` where unknown.
        lines: One per site.
        gates: Site -> ``T`` lists of ``E`` applied gates; empty unless they were asked for.
    """

    name: str
    tokens: tuple[str, ...]
    prompt_length: int
    task: str = ""
    lines: tuple[StripLine, ...] = ()
    gates: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)

    def majority(self) -> list[int]:
        """The expert with the largest sum of shares over sites, for every token; the first of equals, -1 for none."""
        best = []
        for place in range(len(self.tokens)):
            weight: dict[int, float] = {}
            for line in self.lines:
                if line.experts[place] >= 0:
                    weight[line.experts[place]] = weight.get(line.experts[place], 0.0) + line.shares[place]
            best.append(min(weight, key=lambda expert: (-weight[expert], expert), default=-1))
        return best

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``gates`` only where there are any."""
        plain: dict[str, Any] = {"name": self.name, "task": self.task, "prompt_length": self.prompt_length}
        plain |= {"tokens": list(self.tokens), "lines": [line._asdict() for line in self.lines]}
        if self.gates:
            plain["gates"] = {site: [list(row) for row in rows] for site, rows in self.gates.items()}
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> TokenStrip:
        """The strip of `to_json`; ``KeyError``, ``TypeError`` or ``ValueError`` where it is none."""
        lines = tuple(map(_line_of, plain["lines"]))
        tokens = tuple(map(str, plain["tokens"]))
        if any(len(line.experts) != len(tokens) or len(line.shares) != len(tokens) for line in lines):
            raise ValueError("a line of a strip is not as long as its tokens")
        kept = plain.get("gates", {})
        gates = {str(site): tuple(tuple(map(float, row)) for row in rows) for site, rows in kept.items()}
        return cls(
            name=str(plain["name"]), tokens=tokens, prompt_length=int(plain["prompt_length"]), task=str(plain["task"]),
            lines=lines, gates=gates,
        )  # fmt: skip


def strip_of(
    decisions: Sequence[Decisions],
    tokens: Sequence[str],
    *,
    name: str,
    prompt_length: int | None = None,
    task: str = "",
    row: int = 0,
    rows: int = 1,
    gates: bool = False,
    sites: Collection[str] | None = None,
) -> TokenStrip:
    """Make the strip of one row of a batch from the decisions of one forward.

    A gate that decides once per row or batch stands at every token.

    Args:
        decisions: Of one forward.
        tokens: Texts of the row's tokens, without padding.
        name: Of the example.
        prompt_length: How many tokens are the prompt; None: all.
        task: Name of its task.
        row: Which row.
        rows: ``B``.
        gates: Keep the applied gates as well.
        sites: Names of the sites to take; None: all. In encoder-decoder models: those that read these tokens.

    Raises:
        IncompatibleError: The decisions are of another number of rows or tokens.
    """
    lines, kept = [], {}
    for each in decisions:
        if sites is not None and each.site not in sites:
            continue
        places = _places(each, len(tokens), row, rows)
        chosen = dominant_expert(each)[places].cpu()
        shares = gate_shares(each)[places].cpu()
        largest = shares.gather(-1, chosen.clamp_min(0)[:, None]).squeeze(-1)
        lines.append(StripLine(each.site, each.layer, tuple(chosen.tolist()), tuple(largest.tolist())))
        if gates:
            kept[each.site] = tuple(tuple(line) for line in each.gates_NE[places].detach().cpu().tolist())
    length = len(tokens) if prompt_length is None else prompt_length
    return TokenStrip(name=name, tokens=tuple(tokens), prompt_length=length, task=task, lines=tuple(lines), gates=kept)


def _line_of(plain: Mapping[str, Any]) -> StripLine:
    experts, shares = tuple(map(int, plain["experts"])), tuple(map(float, plain["shares"]))
    return StripLine(str(plain["site"]), int(plain["layer"]), experts, shares)


def _places(decisions: Decisions, tokens: int, row: int, rows: int) -> torch.Tensor:
    """Which decisions are the row's tokens, ``(T,)``."""
    lines = len(decisions.real_N)
    device = decisions.real_N.device
    if lines == 1 or (lines == rows and tokens != 1):
        return torch.full((tokens,), 0 if lines == 1 else row, device=device)
    if lines % rows == 0:
        width = lines // rows
        real = decisions.real_N[row * width : (row + 1) * width].nonzero().squeeze(-1) + row * width
        if len(real) == tokens:
            return real
    raise IncompatibleError(
        f"{decisions.site}: {lines} decisions do not belong to {rows} rows of which row {row} has {tokens} tokens; "
        "name the sites that read these tokens (sites=...)"
    )
