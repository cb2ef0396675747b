"""The attached model inside what users run: generate, Trainer, gradient checkpointing, bfloat16, torch.compile."""

import warnings

import pytest
import torch
from torch.testing import assert_close

import compose
from compose.engine.coefficients import Coefficients
from compose.engine.generate import generate_tokens

BF16 = 0.02
"""Relative error of three layers in bfloat16, whose unit roundoff is 0.004; coefficients are small enough that the
random network does not amplify it."""

PROMPTS = [[5, 9, 11, 4, 30], [7, 8, 6], [40, 41, 42, 43]]


def generate(model, rows: list[list[int]], **options) -> torch.Tensor:
    width = max(map(len, rows))
    left = not model.config.is_encoder_decoder
    ids = torch.tensor([[0] * (width - len(r)) + r if left else r + [0] * (width - len(r)) for r in rows])
    return model.generate(
        input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=6, do_sample=False, pad_token_id=0,
        eos_token_id=None, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_generate_gives_every_row_what_it_gets_alone(tiny_model, make_bank, name, options) -> None:
    """Left padding, beams and the cache change nothing: row by row equals the batch."""
    model = tiny_model(name)
    values = torch.randn(3, 4)
    copies = options.get("num_return_sequences", 1)
    with compose.attach(model, make_bank(model)) as attached:
        attached.set(Coefficients(values))
        together = generate(model, PROMPTS, **options)
        for row, prompt in enumerate(PROMPTS):
            attached.set(Coefficients(values[row]))
            alone = generate(model, [prompt], **options)
            new = slice(-6, None)
            assert_close(together[row * copies : (row + 1) * copies, new], alone[:, new])


@pytest.mark.parametrize("combine", ["outputs", "parameters"])
def test_the_cache_changes_nothing(tiny_model, make_bank, combine) -> None:
    model = tiny_model("llama")
    with compose.attach(model, make_bank(model)) as attached:
        attached.set(Coefficients(torch.randn(3, 4), combine))
        assert_close(generate(model, PROMPTS, use_cache=True), generate(model, PROMPTS, use_cache=False))


@pytest.mark.parametrize("combine", ["outputs", "parameters"])
@pytest.mark.parametrize("sparse", [False, True])
def test_values_written_in_place_take_effect(tiny_model, make_bank, combine, sparse) -> None:
    """What is kept between calls must not outlive the numbers it was made from."""
    model, ids = tiny_model("llama"), torch.tensor([[5, 9, 11], [7, 8, 6]])
    values = torch.randn(2, 2 if sparse else 4)
    indices = torch.tensor([[0, 3], [2, 1]]) if sparse else None
    with compose.attach(model, make_bank(model)) as attached, torch.no_grad():
        attached.set(Coefficients(values, combine, indices=indices))
        before = model(ids).logits
        values.mul_(0.5)
        changed = model(ids).logits
        attached.set(Coefficients(values.clone(), combine, indices=indices))
        assert_close(changed, model(ids).logits)
    assert not torch.allclose(before, changed)


def test_numbers_for_the_whole_batch_are_prepared_once_whatever_its_size(tiny_model, make_bank) -> None:
    model = tiny_model("llama")
    with compose.attach(model, make_bank(model)) as attached, torch.no_grad():
        chosen = Coefficients(torch.randn(4), "parameters")
        attached.set(chosen)
        for rows in (1, 2, 5):
            model(torch.ones(rows, 3, dtype=torch.int64))
    assert len(chosen._plans) == 1


def test_used_coefficients_can_be_pickled(tiny_model, make_bank) -> None:
    import pickle

    model, chosen = tiny_model("llama"), Coefficients(torch.randn(4), "parameters")
    with compose.attach(model, make_bank(model)) as attached, torch.no_grad():
        attached.set(chosen)
        wanted = model(torch.tensor([[5, 9, 11]])).logits
        attached.set(pickle.loads(pickle.dumps(chosen)))
        assert_close(model(torch.tensor([[5, 9, 11]])).logits, wanted)


def test_new_tokens_keep_the_last_tokens_coefficients(tiny_model, make_bank) -> None:
    model = tiny_model("llama")
    row = torch.randn(3, 4)
    with compose.attach(model, make_bank(model)) as attached:
        attached.set(Coefficients(row))
        per_row = generate(model, PROMPTS)
        attached.set(Coefficients(row[:, None].expand(3, 5, 4)))
        assert_close(generate(model, PROMPTS), per_row)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate_tokens_is_independent_of_the_batch(tiny_model, make_bank, name) -> None:
    model = tiny_model(name)
    with compose.attach(model, make_bank(model)) as attached:
        attached.set("expert-2")
        together = generate_tokens(model, PROMPTS, max_new_tokens=6, stop_ids=[2])
        alone = [generate_tokens(model, [prompt], max_new_tokens=6, stop_ids=[2])[0] for prompt in PROMPTS]
    assert together == alone
    assert all(0 < len(row) <= 6 for row in together)


def test_generate_tokens_ends_at_a_stop_token(tiny_model) -> None:
    model = tiny_model("llama")
    (free,) = generate_tokens(model, [[5, 9]], max_new_tokens=6, stop_ids=[2])
    (stopped,) = generate_tokens(model, [[5, 9]], max_new_tokens=6, stop_ids=[free[2]])
    assert stopped == free[: free.index(free[2])]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, make_bank, run_model, reentrant) -> None:
    model = tiny_model("llama")
    values = torch.randn(3, 4, requires_grad=True)
    with compose.attach(model, make_bank(model)) as attached:
        attached.set(Coefficients(values))
        (wanted,) = torch.autograd.grad(run_model(model).square().mean(), values)
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        run_model(model).square().mean().backward()
    assert_close(values.grad, wanted, atol=1e-6, rtol=1e-4)


def test_trainer_trains_the_factors_only(tiny_model, make_bank, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model = tiny_model("llama")
    rows = [{"input_ids": torch.tensor(p[:3]), "labels": torch.tensor(p[:3])} for p in PROMPTS] * 4
    frozen = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with compose.attach(model, make_bank(model), trainable=True) as attached, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Trainer's own deprecation notes
        attached.set({"expert-0": 1.0, "expert-2": 0.5})
        options = transformers.TrainingArguments(
            str(tmp_path), max_steps=8, learning_rate=1e-2, per_device_train_batch_size=4, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
            gradient_checkpointing=True, seed=0,
        )  # fmt: skip
        ids = torch.stack([row["input_ids"] for row in rows])
        before = float(model(input_ids=ids, labels=ids).loss)
        transformers.Trainer(model, options, train_dataset=rows).train()
        model.eval()
        assert float(model(input_ids=ids, labels=ids).loss) < before - 0.1
        unused = attached.export()[1].targets["model.layers.1.mlp.up_proj"]
        assert_close(unused.b, attached.bank["expert-1"].targets["model.layers.1.mlp.up_proj"].b, atol=0, rtol=0)
    assert_close(model.model.layers[0].mlp.up_proj.weight, frozen, atol=0, rtol=0)


def test_bfloat16_follows_the_base(tiny_model, make_bank, run_model) -> None:
    model = tiny_model("llama")
    bank = make_bank(model)
    with compose.attach(model, bank) as attached, attached.using(Coefficients(0.1 * torch.randn(3, 4))) as used:
        values = used.active
        wanted = run_model(model)
    model.to(torch.bfloat16)
    with compose.attach(model, bank) as attached:
        assert attached.layers["model.layers.0.mlp.up_proj"].a_RD.dtype == torch.bfloat16
        attached.set(values)
        found = run_model(model)
    assert found.dtype == torch.bfloat16
    relative = (found.float() - wanted).norm() / wanted.norm()
    assert relative < BF16


def test_moving_an_attached_model_moves_the_factors(tiny_model, make_bank, run_model) -> None:
    model = tiny_model("llama")
    with compose.attach(model, make_bank(model)) as attached:
        attached.set("expert-2")
        wanted = run_model(model)
        model.to(torch.float64)
        layer = attached.layers["model.layers.0.mlp.up_proj"]
        assert layer.stack.a_RD.dtype == torch.float64
        assert layer.stack.scaling_E.dtype == torch.float32
        assert_close(run_model(model).float(), wanted, atol=1e-5, rtol=1e-5)


def test_autocast_runs(tiny_model, make_bank, run_model) -> None:
    model = tiny_model("llama")
    with compose.attach(model, make_bank(model)) as attached, attached.using({"expert-0": 0.1}):
        wanted = run_model(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = run_model(model)
    assert (found.float() - wanted).norm() / wanted.norm() < BF16


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole batch", "per row", "adapter ids", "parameters"])
def test_compile_has_no_graph_break(tiny_model, make_bank, run_model, kind) -> None:
    model = tiny_model("llama")
    del model.model.layers[2:]  # two are traced as many are
    selections = {
        "whole batch": Coefficients(torch.randn(4)),
        "per row": Coefficients(torch.randn(3, 4)),
        "adapter ids": ["expert-2", None, "expert-0"],
        "parameters": Coefficients(torch.randn(3, 4), "parameters"),
    }
    with compose.attach(model, make_bank(model)) as attached, torch.no_grad():
        attached.set(selections[kind])
        wanted = run_model(model, use_cache=False)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        ids = torch.randint(3, 67, (3, 7), generator=torch.Generator().manual_seed(1))
        assert_close(compiled(input_ids=ids, use_cache=False).logits, wanted, atol=2e-5, rtol=1e-5)
