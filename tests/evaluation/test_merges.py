"""The best merge of a bank: by loss on other items; methods that refuse a bank are told."""

from types import SimpleNamespace

import pytest
import torch

from compose.engine.attach import attach
from compose.engine.coefficients import Coefficients
from compose.errors import IncompatibleError, UnknownNameError
from compose.evaluation import merges
from compose.evaluation.around import fixed
from compose.evaluation.merges import SCALES, best_merge
from compose.fewshot.scoring import score


@pytest.fixture
def planted(monkeypatch, bank):
    """Merge methods whose results are known: an adapter of the bank each, and one that refuses."""

    def merge(given, method, weights, **options):
        assert weights == dict.fromkeys(given.names, 1 / 3)
        if method == "refuses":
            raise IncompatibleError("not these ranks")
        return SimpleNamespace(adapter=bank[method])

    monkeypatch.setattr(merges, "merge", merge)


@pytest.mark.parametrize("task", ["sum", "largest"])
def test_the_better_of_two_is_found(task, planted, loaded, bank, records) -> None:
    items = [record.example for record in records(4, task)]
    best = best_merge(loaded, bank, items, rank=8, methods=("sum", "largest"))
    assert best.adapter.name == task
    assert best.scale in [scale * 3**0.5 for scale in SCALES]
    assert best.about.startswith(f"{task}, factor ")


def test_methods_that_refuse_the_bank_are_told(planted, loaded, bank, records) -> None:
    items = [record.example for record in records(2, "sum")]
    best = best_merge(loaded, bank, items, rank=8, methods=("refuses", "sum"))
    assert best.adapter.name == "sum"
    assert best.about.endswith("; not for this bank: refuses")
    with pytest.raises(IncompatibleError, match="refuses: not these ranks"):
        best_merge(loaded, bank, items, rank=8, methods=("refuses",))
    with pytest.raises(IncompatibleError, match="no merge is named"):
        best_merge(loaded, bank, items, rank=8, methods=())


def test_the_factor_has_the_lowest_loss(loaded, bank, records) -> None:
    one, items = bank.select(("sum",)), [record.example for record in records(4, "largest")]
    best = best_merge(loaded, one, items, rank=16, methods=("sum",))
    with attach(loaded.model, one) as attached:
        losses = {
            scale: score(loaded, items, fixed(attached, Coefficients(torch.tensor([scale])))).losses.mean()
            for scale in SCALES
        }
    assert best.scale == min(losses, key=losses.get)
    assert best.adapter.targets.keys() == one.targets.keys()


def test_an_unknown_method_is_named(loaded, bank, records) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'ties'"):
        best_merge(loaded, bank, [record.example for record in records(1)], rank=8, methods=("tise",))
