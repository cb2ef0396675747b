"""Attach the demo bank, mix two adapters, and write the mixture as one PEFT adapter that computes the same.

Prints the model's answer with each adapter alone and with both, then the folder's ranks.
"""

import tempfile
from pathlib import Path

import torch

import compose
from compose.demo.assets import demo_bank, demo_base
from compose.engine.coefficients import Coefficients
from compose.engine.composed import composed_adapter
from compose.engine.generate import generate_tokens
from compose.fewshot.loading import load_model


def main() -> None:
    """Run the example."""
    model, tokenizer, prompt_format = load_model(demo_base())
    bank = compose.Bank.open(demo_bank())
    prompt = tokenizer(prompt_format.prompt_template.format(input="Write in capitals: stone river lamp")).input_ids

    def answer() -> str:
        (row,) = generate_tokens(model, [prompt], max_new_tokens=32, stop_ids=[tokenizer.eos_token_id])
        return tokenizer.decode(row)

    mixture = {"capitals": 1.0, "dashes": 1.0}
    with compose.attach(model, bank) as attached:
        for chosen in ("capitals", "dashes", mixture):
            with attached.using(chosen):
                print(f"{chosen}: {answer()}")

    values = torch.tensor([mixture.get(name, 0.0) for name in bank.names])
    adapter = composed_adapter(bank, Coefficients(values), name="capitals-and-dashes").adapter
    with tempfile.TemporaryDirectory() as folder:
        path = compose.write_adapter(adapter, Path(folder) / adapter.name)
        again = compose.read_adapter(path)
    print(f"written: {len(again.targets)} targets, ranks {sorted(set(again.ranks.values()))}")


if __name__ == "__main__":
    main()
