"""Names and shapes: pairs, ranks, foreign tensors, embeddings, missing layers."""

import math

import pytest

Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def pairs(shapes: dict[str, list[int]]) -> tuple[dict, bytes]:
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return header, bytes(position)


def layers(*numbers: int) -> dict[str, list[int]]:
    return {Q.format(at, half): shape for at in numbers for half, shape in (("A", [2, 8]), ("B", [8, 2]))}


def test_half_a_pair_is_named(make, weights, findings) -> None:
    folder = weights(make(), *pairs({**layers(0), Q.format(1, "A"): [2, 8]}))
    (found,) = findings(folder, "tensors.pair")
    assert found.module == "model.layers.1.self_attn.q_proj"
    assert "only factor A" in found.detail


@pytest.mark.parametrize("b", [[8, 3], [8], [8, 2, 1]])
def test_factors_that_do_not_fit(make, weights, findings, b: list[int]) -> None:
    folder = weights(make(), *pairs({Q.format(0, "A"): [2, 8], Q.format(0, "B"): b}))
    assert findings(folder, "tensors.shape")[0].module == "model.layers.0.self_attn.q_proj"


def test_rank_bombs_in_the_tensors(make, weights, findings) -> None:
    folder = weights(make("wide"), *pairs({Q.format(0, "A"): [9, 8], Q.format(0, "B"): [8, 9]}))
    assert "rank 9; at most 8" in findings(folder, "tensors.rank")[0].detail
    folder = weights(make("many"), *pairs({Q.format(0, "A"): [1025, 1100], Q.format(0, "B"): [1100, 1025]}))
    assert "rank 1,025; at most 1,024" in findings(folder, "tensors.rank")[0].detail
    folder = weights(make("most"), *pairs({Q.format(0, "A"): [1024, 1024], Q.format(0, "B"): [1024, 1024]}))
    assert findings(folder, "tensors.rank") == []


def test_whole_weights_are_refused_unless_declared_and_expected(make, edit, weights, rules) -> None:
    head = {"base_model.model.score.weight": [3, 8]}
    folder = edit(weights(make(), *pairs({**layers(0), **head})), target_modules=["q_proj"])
    assert "tensors.foreign" in rules(folder)
    assert "tensors.foreign" in rules(folder, full_modules=True)
    edit(folder, modules_to_save=["score"])
    assert "tensors.foreign" in rules(folder)
    found = rules(folder, full_modules=True)
    assert "tensors.foreign" not in found
    assert "tensors.full" in found


def test_embeddings_and_output_matrices_are_told(make, edit, weights, findings) -> None:
    part = "base_model.model.lm_head.lora_{}.weight"
    folder = weights(make(), *pairs({part.format("A"): [2, 8], part.format("B"): [8, 2]}))
    assert [one.module for one in findings(folder, "tensors.embedding")] == ["lm_head"]
    folder = edit(weights(make("two"), *pairs(layers(0))), modules_to_save=["embed_tokens"])
    assert [one.module for one in findings(folder, "tensors.embedding")] == ["embed_tokens"]


def test_missing_layers_are_told_unless_the_configuration_leaves_them_out(make, edit, weights, findings) -> None:
    folder = edit(weights(make(), *pairs(layers(0, 1, 4))), target_modules=["q_proj"])
    assert "layers 2, 3 are missing" in findings(folder, "tensors.gaps")[0].detail
    assert findings(edit(folder, layers_to_transform=[0, 1, 4]), "tensors.gaps") == []
    assert findings(edit(folder, layers_to_transform=None, target_modules=".*q_proj"), "tensors.gaps") == []
    whole = edit(weights(make("two"), *pairs(layers(0, 1, 2))), target_modules=["q_proj"])
    assert findings(whole, "tensors.gaps") == []
