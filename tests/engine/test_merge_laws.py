"""Laws of every merge method on adapters in PEFT's format: plain, rsLoRA, patterned ranks; saved and loaded."""

import json

import pytest
import torch
from torch.testing import assert_close

import compose
from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.errors import IncompatibleError
from compose.merging.method import METHODS

IDS = torch.tensor([[5, 9, 11, 3], [2, 7, 7, 1]])
KINDS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterned": {"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"down_proj": 3}},
}


@pytest.fixture(scope="module")
def written(tiny_model, tmp_path_factory):
    """One trained-looking adapter of each kind, written by PEFT."""
    peft = pytest.importorskip("peft", reason="PEFT writes the adapters")
    root, found = tmp_path_factory.mktemp("written"), {}
    for number, (kind, options) in enumerate(KINDS.items()):
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
        torch.manual_seed(10 + number)
        peft.get_peft_model(tiny_model("llama"), config).save_pretrained(str(root / kind))
        found[kind] = root / kind
    return found


@pytest.fixture
def folders(tiny_model, written):
    """A Llama of the test's own, and the folders of the adapters."""
    return tiny_model("llama"), written


def statistics(bank: Bank) -> dict:
    """What methods with data need, made up: inputs' Gram matrices and Fisher diagonals of every adapter."""
    made = {}
    for target, shape in bank.targets.items():
        x = torch.randn(len(bank), 60, shape.in_features, generator=torch.Generator().manual_seed(1))
        fisher = torch.rand(
            len(bank), shape.out_features, shape.in_features, generator=torch.Generator().manual_seed(2)
        )
        made[target] = {"input_gram": x.transpose(1, 2) @ x, "fisher": fisher}
    return made


def merged(bank: Bank, name: str, **options):
    return compose.merge(bank, name, statistics=statistics(bank), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", [n for n in METHODS if METHODS[n].contract.one_is_identity and METHODS[n].contract.exact_count is None]
)
def test_one_adapter_at_weight_one_is_itself_in_the_model(folders, name, kind) -> None:
    model, found = folders
    bank = Bank.open(found[kind])
    with compose.attach(model, bank) as attached, torch.no_grad():
        attached.set(kind)
        wanted = model(IDS).logits
    undo = merged(bank, name, **(METHODS[name].contract.neutral or {})).merge_into(model)
    with torch.no_grad():
        assert_close(model(IDS).logits, wanted, atol=2e-4, rtol=2e-4)
        undo()
        assert float((model(IDS).logits - wanted).abs().max()) > 0.01


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_loads_equal_here_and_in_peft(folders, tmp_path, name) -> None:
    peft = pytest.importorskip("peft", reason="PEFT reads what we write")
    model, found = folders
    count = METHODS[name].contract.exact_count or 3
    bank = Bank.open(list(found.values())[:count])
    weights = [1.0, 0.4, 0.7][:count]
    if name == "subtract_general":
        weights = [1.0, 0.2, -0.3]
    if name == "model_stock":  # adapters that have nothing in common average to nothing
        bank = Bank.from_adapters([bank["plain"], Adapter("again", bank.base, bank["plain"].targets)])
        weights = [1.0, 1.0]
    result = merged(bank, name, weights=weights, rank=None if METHODS[name].contract.low_rank else 5)
    folder = result.save(tmp_path / "merged")
    assert json.loads((folder / "merge.json").read_text())["method"] == name
    again = Bank.open(folder)["merged"]
    for target, update in result.adapter.targets.items():
        assert_close(again.targets[target].delta(), update.delta(), atol=1e-6, rtol=1e-5)
    with compose.attach(model, Bank.from_adapters([result.adapter])) as attached, torch.no_grad():
        attached.set(result.adapter.name)
        wanted = model(IDS).logits
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(model, str(folder)).eval()
        assert_close(loaded(IDS).logits, wanted, atol=1e-4, rtol=1e-4)
        with loaded.disable_adapter():
            assert float((loaded(IDS).logits - wanted).abs().max()) > 1e-3


def test_adapters_over_different_bases_are_refused() -> None:
    update = LowRank(torch.ones(1, 4), torch.ones(3, 1), 1.0)
    with pytest.raises(IncompatibleError, match="base"):
        compose.merge([Adapter("a", "one", {"x": update}), Adapter("b", "two", {"x": update})])


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].contract.exact_count is None])
def test_disjoint_targets_and_mixed_dtypes_are_merged(name) -> None:
    """Where one adapter alone acts, the others count as zero there; the result has the first adapter's dtype."""
    generator = torch.Generator().manual_seed(4)

    def update(dtype: torch.dtype) -> LowRank:
        a, b = torch.randn(3, 8, generator=generator), torch.randn(6, 3, generator=generator)
        return LowRank(a.to(dtype), b.to(dtype), 0.5)

    bank = Bank.from_adapters(
        [
            Adapter("half", "", {"x": update(torch.bfloat16), "both": update(torch.bfloat16)}),
            Adapter("single", "", {"y": update(torch.float32), "both": update(torch.float32)}),
            Adapter("full", "", {"both": update(torch.float64)}),
        ]
    )
    result = merged(bank, name)
    assert set(result.targets) == {"x", "y", "both"}
    assert all(bool(target.delta.dense().isfinite().all()) for target in result.targets.values())
    assert result.dtype == torch.bfloat16
    if METHODS[name].contract.low_rank and name not in ("model_stock", "subtract_general"):
        assert {update.a.dtype for update in result.adapter.targets.values()} == {torch.bfloat16}
