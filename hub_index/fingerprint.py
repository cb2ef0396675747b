"""Which base model an adapter fits, by what it touches: a hash of module paths and widths instead of a name.

Names lie: of 30 real configurations six name a local path and one a quantised copy (spec/ecosystem.md 1.2), and PEFT
takes any base whose shapes fit. Two adapters with one fingerprint touch the same modules with the same widths; a base
model has that fingerprint when its own layers of those names give it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from compose.hub_index.records import ModuleRecord

if TYPE_CHECKING:
    from compose.hub_index.audit.base_model import BaseModel

_LAYERS = ("linear", "embedding")


def base_fingerprint(modules: Iterable[ModuleRecord], model_type: str = "") -> str:
    """Return SHA-256 over the sorted (module, in, out) of an adapter's targets and the base's model type.

    Args:
        modules: Of the adapter; whole replaced weights (``"full"``) and widths that no file tells (0) are left out.
        model_type: As the base's ``config.json`` says it, ``""`` when unknown.

    Returns:
        64 hexadecimal digits; ``""`` where no target has both widths.
    """
    shapes = sorted(
        [one.name, one.in_features, one.out_features]
        for one in modules
        if one.kind in _LAYERS and one.in_features and one.out_features
    )
    if not shapes:
        return ""
    return hashlib.sha256(json.dumps([model_type, shapes], ensure_ascii=True).encode()).hexdigest()


def fingerprint_in(base: BaseModel, modules: Iterable[ModuleRecord]) -> str:
    """Return the fingerprint that ``base`` itself gives for these modules; ``""`` where it lacks one of them.

    It equals the adapter's `base_fingerprint` with the base's model type exactly when all its targets fit.
    """
    found = []
    for one in modules:
        if one.kind not in _LAYERS or not (one.in_features and one.out_features):
            continue
        layer = base.find(one.name)
        if layer is None:
            return ""
        wide = (layer.in_features, layer.out_features)
        inside, outside = wide if one.kind == "linear" else wide[::-1]
        found.append(ModuleRecord(name=one.name, kind=one.kind, in_features=inside, out_features=outside))
    return base_fingerprint(found, base.model_type)
