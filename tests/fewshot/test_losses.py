"""Response losses: the mean token cross-entropy, whatever the batch, the padding and the architecture."""

import pytest
import torch
from torch.testing import assert_close

from compose.fewshot.losses import response_losses
from compose.text.encoding import Encoded

ROWS = [Encoded((5, 9, 11), (4, 30, 2)), Encoded((7, 8, 6, 12, 40), (3, 2)), Encoded((41,), (3, 8, 9, 10, 2))]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decoder_row_equals_the_library_loss(tiny_model, name) -> None:
    """Hugging Face's own loss with the prompt masked is the oracle."""
    model = tiny_model(name)
    wanted = []
    for row in ROWS:
        ids = torch.tensor([[*row.prompt, *row.response]])
        labels = torch.tensor([[-100] * len(row.prompt) + list(row.response)])
        wanted.append(model(input_ids=ids, labels=labels).loss)
    assert_close(response_losses(model, ROWS), torch.stack(wanted), atol=1e-5, rtol=1e-5)


def test_an_encoder_decoder_row_equals_the_library_loss(tiny_model) -> None:
    model = tiny_model("t5")
    wanted = [model(input_ids=torch.tensor([r.prompt]), labels=torch.tensor([r.response])).loss for r in ROWS]
    assert_close(response_losses(model, ROWS), torch.stack(wanted), atol=1e-5, rtol=1e-5)
