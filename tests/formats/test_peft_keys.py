"""Every spelling of a key leads to the same adapter; every name that leads nowhere is an error that names it."""

import pytest
import torch

from compose.errors import AdapterFormatError
from compose.formats.peft import read_adapter
from compose.formats.peft_keys import parse_keys, strip_prefix

SPELLINGS = {
    "canonical": lambda key: key,
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "ddp": lambda key: "module." + key,
    "ddp inside": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "compiled": lambda key: "_orig_mod." + key,
    "compiled base": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled layers": lambda key: key.replace(".layers.0.", ".layers.0._orig_mod.").replace("s.1.", "s.1._orig_mod."),
    "compiled ddp": lambda key: "module._orig_mod." + key,
    "one base_model": lambda key: key.replace("base_model.model.", "base_model."),
    "default infix": lambda key: key.replace(".weight", ".default.weight"),
    "other infix": lambda key: key.replace(".weight", ".my-adapter.weight"),
    "infix without prefix": lambda key: key.removeprefix("base_model.model.").replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_every_spelling_reads_the_same(spelling, make_folder, tensors):
    plain = read_adapter(make_folder("plain"))
    renamed = {SPELLINGS[spelling](key): value for key, value in tensors.items()}
    assert len(renamed) == len(tensors)
    other = read_adapter(make_folder("other", renamed))
    assert list(other.targets) == list(plain.targets) == [f"m.layers.{n}.{t}" for n in (0, 1) for t in ("q", "v")]
    for path, update in plain.targets.items():
        torch.testing.assert_close(other.targets[path].a, update.a, rtol=0, atol=0)
        torch.testing.assert_close(other.targets[path].b, update.b, rtol=0, atol=0)


def test_strip_prefix_takes_one_peft_prefix_only():
    assert strip_prefix("base_model.model.model.layers.0.q") == "model.layers.0.q"
    assert strip_prefix("model.layers.0.q") == "model.layers.0.q"


def test_layers_are_in_natural_order(make_folder):
    tensors = {}
    for layer in (10, 2, 1):
        tensors[f"m.layers.{layer}.q.lora_A.weight"] = torch.ones(2, 6)
        tensors[f"m.layers.{layer}.q.lora_B.weight"] = torch.ones(5, 2)
    adapter = read_adapter(make_folder("x", tensors, target_modules=["q"]))
    assert [path.split(".")[2] for path in adapter.targets] == ["1", "2", "10"]


Q = "base_model.model.m.layers.0.q"
REFUSED = {
    "A without B": (f"{Q}.lora_B.weight", None, r"layers\.0\.q\.lora_A\.weight has no matching B"),
    "B without A": (f"{Q}.lora_A.weight", None, r"layers\.0\.q\.lora_B\.weight has no matching A"),
    "base weight": (None, f"{Q}.base_layer.weight", r"q\.base_layer\.weight is used by nothing"),
    "stray tensor": (None, "base_model.model.m.norm.weight", r"m\.norm\.weight is used by nothing"),
    "dora": (None, f"{Q}.lora_magnitude_vector", r"lora_magnitude_vector belongs to DoRA"),
    "lora bias": (None, f"{Q}.lora_B.bias", r"lora_B\.bias is a LoRA bias"),
    "lora bias, infix": (None, f"{Q}.lora_B.default.bias", r"lora_B\.default\.bias is a LoRA bias"),
    "embedding bias": (None, "m.emb.lora_embedding_B.bias", r"lora_embedding_B\.bias is a LoRA bias"),
    "base bias": (None, f"{Q}.base_layer.bias", r"base_layer\.bias is used by nothing"),
    "adalora": (None, f"{Q}.lora_E", "belongs to AdaLoRA"),
    "kohya": (None, "m.layers.0.k.lora_down.weight", "belongs to kohya-style LoRA"),
    "loha": (None, f"{Q}.hada_w1_a", "belongs to LoHa"),
    "lokr": (None, f"{Q}.lokr_w1", "belongs to LoKr"),
    "ia3": (None, f"{Q}.ia3_l", "belongs to IA3"),
    "vera": (None, f"{Q}.vera_lambda_b", "belongs to VeRA"),
    "trainable tokens": (None, "m.embed_tokens.token_adapter.trainable_tokens_delta", "belongs to trainable tokens"),
    "unknown lora tensor": (None, f"{Q}.lora_C.weight", "is no known LoRA tensor"),
    "nested": (None, f"{Q}.base_layer.lora_A.weight", "is nested LoRA"),
    "raw copy": (None, "m.lm_head.original_module.weight", "is a copy of the base's own weights"),
    "same factor twice": (None, "m.layers.0.q.lora_A.weight", "are the same factor"),
    "two adapters": (None, "m.layers.0.k.lora_A.second.weight", "tensors of several adapters in one file"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_every_unused_or_unmet_tensor_is_named(case, make_folder, tensors):
    removed, added, message = REFUSED[case]
    if removed:
        del tensors[removed]
    if added:
        tensors[added] = torch.ones(2, 6)
    with pytest.raises(AdapterFormatError, match=message):
        read_adapter(make_folder("x", tensors))


def test_all_problems_of_the_names_come_at_once():
    with pytest.raises(AdapterFormatError) as caught:
        parse_keys(["a.lora_A.weight", "b.lora_B.weight", "c.lora_magnitude_vector"])
    for part in ("a.lora_A.weight has no matching B", "b.lora_B.weight has no matching A", "DoRA"):
        assert part in str(caught.value)


def test_convolutions_are_refused(make_folder, tensors):
    tensors[f"{Q}.lora_A.weight"] = torch.ones(2, 6, 3, 3)
    with pytest.raises(AdapterFormatError, match=r"m\.layers\.0\.q.*not convolutions"):
        read_adapter(make_folder("x", tensors))


def test_factors_of_unlike_rank_or_dtype_are_refused(make_folder, tensors):
    tensors[f"{Q}.lora_B.weight"] = torch.ones(5, 3)
    with pytest.raises(AdapterFormatError, match=r"A \(2, 6\) and B \(5, 3\) differ in rank"):
        read_adapter(make_folder("x", tensors))
    tensors[f"{Q}.lora_B.weight"] = torch.ones(5, 2, dtype=torch.bfloat16)
    with pytest.raises(AdapterFormatError, match=r"A is torch.float32 and B torch.bfloat16"):
        read_adapter(make_folder("y", tensors))


def test_saved_modules_in_raw_spelling_are_found(make_folder, tensors):
    tensors["base_model.model.score.modules_to_save.default.weight"] = torch.ones(3, 6)
    adapter = read_adapter(make_folder("x", tensors, modules_to_save=["score", "classifier"], task_type="SEQ_CLS"))
    assert list(adapter.full_modules) == ["score.weight"]
