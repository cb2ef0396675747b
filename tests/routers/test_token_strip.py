"""Strips: the right tokens of the right row, whatever the gates' scope, and back from JSON."""

import json

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.gates.linear import LinearGate
from compose.routers.site_sums import dominant_expert
from compose.routers.spec import MixtureSpec
from compose.routers.token_strip import StripLine, TokenStrip, strip_of

NORMAL = LinearGate(init="normal", std=1.0)
TOKEN = MixtureSpec(gate=NORMAL)
SEQUENCE = MixtureSpec(gate=NORMAL, site="block", scope="sequence", gate_input="block", pooling="mean")


def recorded(routed, inputs):
    with torch.no_grad(), routed.recording() as decisions:
        routed(**inputs)
    return decisions


def test_the_tokens_of_a_padded_row(routed_over, batch) -> None:
    routed = routed_over("llama", TOKEN)
    inputs = batch("llama")
    decisions = recorded(routed, inputs)
    strip = strip_of(decisions, list("abcdefg"), name="last", row=2, rows=3, prompt_length=5, task="t", gates=True)
    alone = recorded(routed, {"input_ids": inputs["input_ids"][2:, :7]})
    assert [line.site for line in strip.lines] == list(routed.router.layout)
    for line, each in zip(strip.lines, alone, strict=True):
        assert line.experts == tuple(dominant_expert(each).tolist())
        torch.testing.assert_close(torch.tensor(line.shares), each.gates_NE.amax(-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(strip.gates[line.site]), each.gates_NE, rtol=1e-4, atol=1e-5)


def test_a_gate_per_sequence_stands_at_every_token(routed_over, batch) -> None:
    decisions = recorded(routed_over("llama", SEQUENCE), batch("llama"))
    strip = strip_of(decisions, list("abcdefghi"), name="one", row=1, rows=3)
    for line, each in zip(strip.lines, decisions, strict=True):
        assert line.experts == (int(dominant_expert(each)[1]),) * 9
    assert strip.gates == {}
    assert strip.prompt_length == 9


def test_tokens_of_another_number_are_refused(routed_over, batch) -> None:
    decisions = recorded(routed_over("llama", TOKEN), batch("llama"))
    with pytest.raises(IncompatibleError, match="row 2 has 9 tokens"):
        strip_of(decisions, list("abcdefghi"), name="x", row=2, rows=3)


def test_sites_can_be_chosen(routed_over, batch) -> None:
    decisions = recorded(routed_over("t5", TOKEN), batch("t5"))
    encoder = [each.site for each in decisions if each.site.startswith("encoder")]
    strip = strip_of(decisions, list("abcdefghi"), name="x", rows=3, sites=encoder)
    assert [line.site for line in strip.lines] == encoder


def strip(**changes) -> TokenStrip:
    lines = (
        StripLine("a", 0, (1, 0, -1, 0), (0.6, 0.5, 0.0, 0.4)),
        StripLine("b", 1, (2, 1, -1, 0), (0.6, 0.7, 0.0, 0.4)),
        StripLine("c", 2, (2, 0, -1, 1), (0.6, 0.3, 0.0, 0.8)),
    )
    return TokenStrip(**{"name": "x", "tokens": ("w", " x", "y", "\n"), "prompt_length": 2, "lines": lines, **changes})


def test_the_majority_weighs_shares_and_takes_the_first_of_equals() -> None:
    assert strip().majority() == [2, 0, -1, 0]
    assert strip(lines=()).majority() == [-1] * 4


def test_json_gives_the_same_strip_back() -> None:
    for given in (strip(), strip(task="t", gates={"a": ((0.25, 0.75),) * 4})):
        assert TokenStrip.from_json(json.loads(json.dumps(given.to_json()))) == given
    assert "gates" not in strip().to_json()


def test_a_line_of_another_length_is_refused() -> None:
    plain = strip().to_json()
    plain["lines"][0]["experts"] = [1]
    with pytest.raises(ValueError, match="not as long"):
        TokenStrip.from_json(plain)
