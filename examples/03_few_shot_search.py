"""Few-shot search on a held-out task of the demo: five examples in, weights over the bank and a comparison out.

Prints what was chosen and why, the largest weights, and exact match beside base, best single and a LoRA on the shots.
"""

import compose
from compose.demo.assets import demo_bank, demo_base
from compose.demo.tasks import TASKS, shots, test_items
from compose.fewshot.loading import load_model
from compose.fewshot.settings import SearchSettings
from compose.text.examples import Example


def main() -> None:
    """Run the example."""
    task = next(task for task in TASKS.values() if task.group == "wording")
    examples = [Example(item.input, item.output) for item in shots(task, 5, 0)]
    held_out = [Example(item.input, item.output) for item in test_items(task, 40)]
    settings = SearchSettings(budget=200, folds=3, controls=("base", "best_single", "trained_lora"))
    run = compose.few_shot_search(
        load_model(demo_base()), compose.Bank.open(demo_bank()), examples, test=held_out, settings=settings
    )

    print(f"task {task.name}: {examples[0].input!r} -> {examples[0].output!r}")
    print(run.report["search"]["reason"])
    weights = run.report["weights"]
    strength = {
        name: max(column, key=abs)
        for name, column in zip(weights["adapters"], zip(*weights["values"], strict=True), strict=True)
    }
    for name in sorted(strength, key=lambda name: -abs(strength[name]))[:3]:
        print(f"  {name}: {strength[name]:.2f}")
    for control in run.report["controls"]:
        print(f"  {control['label']}: exact match {control['test']['exact_match']['mean']:.2f}")


if __name__ == "__main__":
    main()
