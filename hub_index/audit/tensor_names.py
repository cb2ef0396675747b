"""Which tensors of a file are the two factors of which module, as far as their names tell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compose.formats.peft_keys import strip_prefix
from compose.hub_index.audit.raw_header import RawTensor

_HALVES = {"lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b"}


@dataclass
class Halves:
    """The factors of one module: ``a (R, I)`` and ``b (O, R)``, None where the file has none."""

    a: RawTensor | None = None
    b: RawTensor | None = None

    @property
    def fits(self) -> bool:
        """Whether both are there and are matrices of one rank."""
        both = self.a is not None and self.b is not None
        return both and len(self.a.shape) == len(self.b.shape) == 2 and self.a.shape[0] == self.b.shape[1]  # type: ignore[union-attr]


def factor_of(name: str) -> tuple[str, str] | None:
    """Return (module path, ``"a"`` or ``"b"``) of a LoRA factor, None for every other name.

    Names of files from before PEFT 0.3 and names with an adapter's name inside (``lora_A.default.weight``) count.
    """
    segments = strip_prefix(name).removesuffix(".weight").split(".")
    for at in (len(segments) - 1, len(segments) - 2):
        if at > 0 and segments[at] in _HALVES:
            return ".".join(segments[:at]), _HALVES[segments[at]]
    return None


def group_halves(tensors: Iterable[RawTensor]) -> dict[str, Halves]:
    """Return module path -> its factors, in the file's order."""
    found: dict[str, Halves] = {}
    for tensor in tensors:
        factor = factor_of(tensor.name)
        if factor is not None:
            setattr(found.setdefault(factor[0], Halves()), factor[1], tensor)
    return found
