"""Merge adapters of the demo bank: an exact sum, its best rank-8 form, TIES, and the base model with a merge inside.

Prints ranks and what recompression loses, and shows that the saved adapter and the changed model write the same text.
"""

import tempfile
from pathlib import Path

import compose
from compose.demo.assets import demo_bank, demo_base
from compose.engine.generate import generate_tokens
from compose.fewshot.loading import load_model
from compose.fewshot.scoring import stop_ids

PROMPT = "Write the words in reverse order, joined with dashes: curve wool tuna\n"
WEIGHTS = "reverse_order + dashes"


def main() -> None:
    """Run the example."""
    bank, loaded = compose.Bank.open(demo_bank()), load_model(demo_base())
    prompt = [loaded.tokenizer(PROMPT).input_ids]

    def answer() -> str:
        (ids,) = generate_tokens(loaded.model, prompt, max_new_tokens=24, stop_ids=stop_ids(loaded))
        return loaded.tokenizer.decode(ids)

    exact = compose.merge(bank, weights=WEIGHTS)
    small = compose.merge(bank, weights=WEIGHTS, rank=8)
    ties = compose.merge(bank, "ties", WEIGHTS, density=0.2, rank=8)
    for name, merged in {"sum": exact, "sum at rank 8": small, "TIES at rank 8": ties}.items():
        rank, lost = max(merged.adapter.ranks.values()), merged.relative_error
        print(f"{name}: rank {rank}, {100 * lost:.1f} % of the norm lost")

    with tempfile.TemporaryDirectory() as folder:
        exact.save(Path(folder) / "merged")
        with compose.attach(loaded.model, compose.Bank.open(Path(folder) / "merged")) as attached:
            attached.set("merged")
            print(f"the saved adapter writes {answer()!r}")
    undo = exact.merge_into(loaded.model)
    print(f"the changed model writes {answer()!r}")
    undo()
    print(f"the base model writes {answer()!r}")


if __name__ == "__main__":
    main()
