"""Merge two adapters of the demo with a little data of both tasks: RegMean, RegMean++, Fisher, AdaMerging, CAT, ENMP.

Prints the loss on held-out items of both tasks for the plain mean and for every method, and what CAT learned. The
learned methods run few steps here, to be quick; a real merge takes more (see the options' defaults). None wins on both
tasks, and AdaMerging, which sees no labels, settles for the adapter surest of itself: compare on held-out data.
"""

from collections.abc import Sequence

import torch

import compose
from compose.demo.assets import demo_bank, demo_base
from compose.demo.tasks import TASKS, test_items
from compose.engine.data_merge import merge_with_data
from compose.engine.merged import Merged
from compose.fewshot.loading import LoadedModel, load_model
from compose.fewshot.losses import response_losses
from compose.text.encoding import encode, pad
from compose.text.examples import Example

NAMES = ("commas", "sort_words")
OPTIONS = {
    "regmean": {},
    "regmean_pp": {},
    "fisher": {"rank": 32},
    "adamerging": {"steps": 10, "lr": 0.02},
    "cat": {"steps": 30, "lr": 0.05},
    "enmp": {"generations": 2},
}


def batch(loaded: LoadedModel, items: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Make a batch: prompts and answers padded on the right, labels at the answers only."""
    rows = encode(items, loaded.tokenizer, loaded.prompt_format, encoder_decoder=False)
    ids, mask = pad([[*row.prompt, *row.response] for row in rows], fill=0)
    labels = ids.masked_fill(mask == 0, -100)
    for line, row in zip(labels, rows, strict=True):
        line[: len(row.prompt)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main() -> None:
    """Run the example."""
    torch.set_num_threads(1)  # the demo model is too small for a second thread to pay
    loaded, bank = load_model(demo_base()), compose.Bank.open(demo_bank()).select(NAMES)
    tasks = {name: TASKS[name].sample("merge", 24) for name in NAMES}
    examples = {name: [Example(item.input, item.output) for item in items] for name, items in tasks.items()}
    data = {name: [batch(loaded, items[n : n + 8]) for n in (0, 8, 16)] for name, items in examples.items()}
    held_out = {name: [Example(item.input, item.output) for item in test_items(TASKS[name], 20)] for name in NAMES}

    def report(label: str, merged: Merged) -> None:
        undo = merged.merge_into(loaded.model)
        losses = {}
        for name, items in held_out.items():
            rows = encode(items, loaded.tokenizer, loaded.prompt_format, encoder_decoder=False)
            with torch.no_grad():
                losses[name] = float(response_losses(loaded.model, rows).mean())
        undo()
        print(f"{label}: " + ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items()))

    report("mean", compose.merge(bank, "mean"))
    for method, options in OPTIONS.items():
        with compose.attach(loaded.model, bank) as attached:
            merged = merge_with_data(attached, method, data, **options)
        report(method, merged)
        if method == "cat":
            for parent in merged.recipe["parents"]:
                weights = parent["weight"].values()
                print(f"  {parent['name']}: weights from {min(weights):.2f} to {max(weights):.2f}")


if __name__ == "__main__":
    main()
