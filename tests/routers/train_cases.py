"""Tiny training problems, for tests of training in one process and in several."""

from types import SimpleNamespace

import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.routers.experts import fresh_experts, linear_targets
from compose.routers.gates.linear import LinearGate
from compose.routers.losses.load_balance import SwitchLoadBalance
from compose.routers.records import MixedExample
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec
from compose.text.examples import Example

LETTERS = "abcdefghijklmnopqrstuvwxyz :"


class LetterTokenizer:
    """One token per letter, from 3."""

    eos_token, eos_token_id, bos_token_id, pad_token_id = "$", 2, None, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[2 if letter == "$" else 3 + LETTERS.index(letter) for letter in text])


SPECS = {
    "router": MixtureSpec(gate=LinearGate(init="normal", std=0.5)),
    "both": MixtureSpec(
        gate=LinearGate(init="normal", std=0.5), select=TopK(k=2), renormalise="sum", train="both",
        losses=(SwitchLoadBalance(coefficient=0.1),),
    ),
    "noisy": MixtureSpec(gate=LinearGate(init="normal", std=0.5), train="both", noise=0.3, expert_dropout=0.2),
}  # fmt: skip


def records(count: int = 24) -> list[MixedExample]:
    """Two tasks: repeat the letters, or turn them round; prompts and responses of different lengths."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for number in range(count):
        length = 2 + number % 4
        word = "".join(LETTERS[i] for i in torch.randint(0, 26, (length,), generator=generator).tolist())
        turn = number % 3 == 0
        example = Example(f"{'turn' if turn else 'say'} {word}:", word[::-1] if turn else word)
        found.append(MixedExample(example, "turn" if turn else "say", place=f"mixed.jsonl:{number + 1}"))
    return found


def attached_bank(model, experts: int = 3, *, trainable: bool = True):
    """Experts with B away from zero, so that gates get gradients from the first step."""
    fresh = fresh_experts(model, linear_targets(model), num_experts=experts, rank=2, init="kaiming_both")
    return attach(model, Bank.from_adapters(fresh), trainable=trainable)
