"""What a router may know of a batch: prompts, responses where they are predicted, labels of rows."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.context import RoutingContext, agreed, padding_of, repeat_rows

CPU = torch.device("cpu")
LABELS = torch.tensor([[-100, -100, 7, 8, -100], [-100, 5, 6, -100, -100]])
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])


def test_the_prompt_ends_before_the_first_label() -> None:
    context = RoutingContext().with_inputs(MASK, LABELS, lag=1)
    assert context.prompt(2, 5, CPU).int().tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("lag", "wanted"), [(1, [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]), (0, [[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]])]
)
def test_a_response_is_where_it_is_predicted(lag, wanted) -> None:
    context = RoutingContext().with_inputs(MASK, LABELS, lag=lag)
    assert context.response(2, 5, CPU).int().tolist() == wanted


def test_without_labels_everything_real_is_prompt_and_response() -> None:
    context = RoutingContext(attention_mask=MASK)
    assert torch.equal(context.prompt(2, 5, CPU), MASK.bool())
    assert torch.equal(context.response(2, 5, CPU), MASK.bool())


def test_a_row_without_a_prompt_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="row 1 has no prompt"):
        RoutingContext(prompt_mask=torch.tensor([[1, 0], [0, 0]])).prompt(2, 2, CPU)


def test_tokens_behind_a_given_mask_are_no_prompt() -> None:
    context = RoutingContext(prompt_mask=torch.ones(1, 2, dtype=torch.bool))
    assert context.prompt(1, 4, CPU).tolist() == [[True, True, False, False]]


def test_an_encoder_knows_rows_only() -> None:
    labels = torch.tensor([[-1, 2, 2], [1, 3, -1], [-1, -1, -1]])
    context = RoutingContext(expert_labels=labels).with_inputs(None, LABELS).of_encoder()
    assert context.labels is None
    assert context.expert_labels.tolist() == agreed(labels).tolist() == [2, -1, -1]


def test_rows_are_repeated_in_place_or_refused() -> None:
    assert repeat_rows(torch.tensor([1, 2]), 4).tolist() == [1, 1, 2, 2]
    with pytest.raises(IncompatibleError, match="2 rows, the batch 3"):
        repeat_rows(torch.tensor([1, 2]), 3)


@pytest.mark.parametrize("additive", [False, True])
def test_padding_is_read_off_the_diagonal_of_a_wide_mask(additive) -> None:
    real = torch.tensor([[False, False, True, True, True], [True, True, True, True, True]])
    causal = torch.ones(5, 8, dtype=torch.bool).tril() & torch.nn.functional.pad(real, (0, 3))[:, None]  # B, T, S
    mask = causal[:, None]
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert torch.equal(padding_of(mask, 0), real)
    later = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    assert torch.equal(padding_of(later, 5), torch.ones(2, 1, dtype=torch.bool))
    assert padding_of(real, 0) is real
    assert padding_of(None, 3) is None


@pytest.mark.parametrize("mask", [{"full_attention": None}, torch.ones(2, 1, 5, 4), torch.ones(5, 5)[None]])
def test_a_mask_that_does_not_tell_padding_is_refused(mask) -> None:
    with pytest.raises(IncompatibleError, match="attention mask"):
        padding_of(mask, 0)
