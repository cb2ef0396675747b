"""Adapters chosen by the text itself: a retriever over a bank, and one batch in which every row gets what fits it.

Prints the adapters that are found for four texts, what the base model then writes with the first of them, with the
outputs or the parameters of the first three mixed, and without any adapter; and what a text gets whose own adapter is
taken out. Texts are embedded by the base model itself; `SentenceEncoder()` (extra `retriever`) finds more.
"""

import torch

import compose
from compose.demo.assets import demo_bank, demo_base
from compose.demo.tasks import TASKS
from compose.fewshot.loading import load_model
from compose.retriever.encoders import HiddenStateEncoder
from compose.retriever.retriever import Retriever

TEXTS = [
    "Upper case: stone river lamp",
    "List backwards: stone river lamp",
    "Sort the words: stone river lamp",
    "First letters: stone river lamp",
]


def main() -> None:
    """Run the example."""
    torch.set_num_threads(1)  # the demo model is too small for a second thread to pay
    loaded, bank = load_model(demo_base()), compose.Bank.open(demo_bank())
    inputs = {name: [item.input for item in TASKS[name].sample("retriever", 20)] for name in bank.names}
    written = {"tokenizer": loaded.tokenizer, "prompt_format": loaded.prompt_format, "max_new_tokens": 32}
    with compose.attach(loaded.model, bank) as attached:
        retriever = Retriever.fit(HiddenStateEncoder(attached, loaded.tokenizer), inputs)
        for text, names in zip(TEXTS, retriever.top(TEXTS, k=3).names, strict=True):
            print(f"{text!r}: {', '.join(names)}")

        for label, options in {
            "the first": {"mode": "selection"},
            "outputs of three, by similarity": {"mode": "mixture", "k": 3, "weights": "similarity"},
            "parameters of three, by similarity": {"mode": "fusion", "k": 3, "weights": "similarity"},
            "parameters of three, equally": {"mode": "fusion", "k": 3},
            "none": {"threshold": float("inf")},
        }.items():
            found = compose.retrieve_and_generate(attached, retriever, TEXTS, **options, **written)
            print(f"{label}: {found.texts}")

        own = [row[0] for row in retriever.top(TEXTS, k=1).names]
        found = compose.retrieve_and_generate(attached, retriever, TEXTS, exclude=own, **written)
        print(f"without its own: {[next(iter(row)) for row in found.rows]}")


if __name__ == "__main__":
    main()
