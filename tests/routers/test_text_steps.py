"""Gates that read the text so far: every token has those of the text that ends with it, cached or not."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.calibration import calibrate
from compose.routers.presets.registry import preset
from compose.routers.text_steps import generate_by_step

WIDTH = 5
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


def decode(ids):
    return " ".join(map(str, ids))


class Encoder:
    """Embeds a text by its words; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked = []

    def __call__(self, texts):
        self.asked += texts
        rows = [torch.tensor([int(word) for word in text.split()]) for text in texts]
        return torch.stack(
            [torch.stack([(row * (k + 1)).double().sin().mean() for k in range(WIDTH)]) for row in rows]
        )


def make(routed_over, name="llama"):
    routed = routed_over(name, preset("token_level"), text_features=WIDTH)
    data = {
        expert: [{"text_embedding": torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(number))}]
        for number, expert in enumerate(routed.router.experts)
    }
    calibrate(routed, data)
    return routed


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_changes_nothing(name, routed_over) -> None:
    routed = make(routed_over, name)
    hooks = len(routed.model._forward_pre_hooks)
    options = {"decode": decode, "encode": Encoder(), "max_new_tokens": 8, "stop_ids": [1]}
    cached = generate_by_step(routed, PROMPTS, **options)
    assert cached == generate_by_step(routed, PROMPTS, use_cache=False, **options)
    assert len(routed.model._forward_pre_hooks) == hooks


def test_gates_are_those_of_the_text_so_far(routed_over) -> None:
    routed = make(routed_over)
    encoder = Encoder()
    with routed.recording() as decisions:
        (new,) = generate_by_step(
            routed, [PROMPTS[0]], decode=decode, encode=encoder, max_new_tokens=4, stop_ids=[]
        )  # fmt: skip
    gate = next(iter(routed.router.gates.values())).gate
    centroids = torch.nn.functional.normalize(gate.prototypes_EPD[:, 0], dim=-1)
    texts = [PROMPTS[0]] * 4 + [PROMPTS[0] + new[: place + 1] for place in range(3)]
    for decided, text in zip(torch.cat([each.gates_NE for each in decisions]), texts, strict=True):
        (embedding,) = Encoder()([decode(text)])
        scores = torch.nn.functional.normalize(embedding.float(), dim=-1) @ centroids.T
        scores[scores.argmax()] *= 4
        torch.testing.assert_close(decided, torch.softmax(scores, -1))
    assert len(encoder.asked) == len(set(encoder.asked)) == 4  # a text is embedded once


def test_rows_do_not_depend_on_their_neighbours(routed_over) -> None:
    routed = make(routed_over)
    options = {"decode": decode, "encode": Encoder(), "max_new_tokens": 6, "stop_ids": [1]}
    together = generate_by_step(routed, PROMPTS, **options)
    assert together == [generate_by_step(routed, [prompt], **options)[0] for prompt in PROMPTS]


def test_what_it_cannot_do_is_refused(routed_over) -> None:
    routed = make(routed_over)
    options = {"decode": decode, "encode": Encoder()}
    for name in ("num_beams", "num_return_sequences"):
        with pytest.raises(IncompatibleError, match=f"{name} must be 1"):
            generate_by_step(routed, PROMPTS, **options, **{name: 2})
    routed.attached.detach()
    with pytest.raises(IncompatibleError, match="decoder-only"):
        generate_by_step(make(routed_over, "t5"), PROMPTS, **options)
    with pytest.raises(IncompatibleError, match="preset 'token_level'"):
        generate_by_step(routed_over("llama", preset("arrow")), PROMPTS, **options)
