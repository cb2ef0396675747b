"""One batch, one forward per token: every row has its own adapter, no adapter, or its own weighted mixture.

Prints one line per row.
"""

import torch

import compose
from compose.demo.assets import demo_bank, demo_base
from compose.engine.coefficients import Coefficients
from compose.engine.generate import generate_tokens
from compose.fewshot.loading import load_model

TEXT = "stone river lamp"


def main() -> None:
    """Run the example."""
    model, tokenizer, prompt_format = load_model(demo_base())
    bank = compose.Bank.open(demo_bank())
    names = ["capitals", "reverse_order", None, "dashes"]
    prompts = [tokenizer(prompt_format.prompt_template.format(input=f"Do it: {TEXT}")).input_ids for _ in names]

    def answers() -> list[str]:
        rows = generate_tokens(model, prompts, max_new_tokens=32, stop_ids=[tokenizer.eos_token_id])
        return tokenizer.batch_decode(rows)

    with compose.attach(model, bank) as attached:
        attached.set(names)
        for name, text in zip(names, answers(), strict=True):
            print(f"adapter {name}: {text}")

        values = torch.zeros(len(names), len(bank))
        for row, partner in enumerate(["dashes", "reverse_order", "initials", "commas"]):
            values[row, bank.index("capitals")] = 1.0
            values[row, bank.index(partner)] = 1.0
        attached.set(Coefficients(values))
        for text in answers():
            print(f"capitals with another: {text}")


if __name__ == "__main__":
    main()
