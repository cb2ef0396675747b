"""Experts and router trained together from nothing, on records of four tasks.

Prints the loss on the way, how many of 20 new items come out right, the share of every expert in the tokens of every
task, and the files of the saved mixture. A mixture has to be compared with one LoRA of the same size:
`compose.evaluation.compare` and `benchmarks/router_study.py` do that over seeds.
"""

import json
import tempfile
from pathlib import Path

import torch

import compose
from compose import routers
from compose.demo.assets import demo_base
from compose.demo.tasks import TASKS, test_items
from compose.fewshot.loading import load_model

NAMES = ("capitals", "dashes", "initials", "shout")


def write_records(file: Path) -> None:
    """One JSON object per line: what ``compose train --data`` reads too."""
    rows = [
        {"task": name, "prompt": item.input, "response": item.output}
        for name in NAMES
        for item in TASKS[name].sample("mixed", 48)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Run the example."""
    torch.set_num_threads(1)  # the demo model is too small for a second thread to pay
    folder = Path(tempfile.mkdtemp())
    write_records(folder / "mixed.jsonl")
    records = routers.read_mixed(folder / "mixed.jsonl")
    loaded = load_model(demo_base())

    experts = routers.fresh_experts(
        loaded.model, routers.linear_targets(loaded.model), num_experts=4, rank=8, alpha=16
    )
    with compose.attach(loaded.model, compose.Bank.from_adapters(experts), trainable=True) as attached:
        spec = routers.preset("mola")  # top-2 of the experts per token and target, with a balance loss
        routed, history = routers.train(
            attached, spec, records, tokenizer=loaded.tokenizer, prompt_format=loaded.prompt_format,
            steps=50, batch_size=8, learning_rate=5e-3, sampling=routers.Sampling(batch="balanced"),
        )  # fmt: skip
        for entry in history[::10]:
            print(f"step {entry['step']}: loss {entry['loss']:.2f}, balance loss {entry['aux']['switch_lb']:.2f}")

        items = [(task, item) for task in range(len(NAMES)) for item in test_items(TASKS[sorted(NAMES)[task]], 5)]
        template = loaded.prompt_format.prompt_template
        prompts = [loaded.tokenizer(template.format(input=item.input)).input_ids for _, item in items]
        meter = routers.RoutingMeter(routed.router.experts, tasks=sorted(NAMES))
        with routed.recording() as decisions:
            rows = routed.generate(prompts, max_new_tokens=32, task_ids=torch.tensor([task for task, _ in items]))
        texts = loaded.tokenizer.batch_decode(rows, skip_special_tokens=True)
        right = sum(text == item.output for text, (_, item) in zip(texts, items, strict=True))
        print(f"{right} of {len(items)} right, the first is {texts[0]!r}")
        meter.update(decisions)
        for task in meter.tasks:
            found = meter.trace().overall(task)
            loads = ", ".join(f"{load:.2f}" for load in found.load)
            print(f"{task}: share of each expert {loads}; entropy {found.entropy:.2f} of {found.largest_entropy:.2f}")
        routers.save(routed, folder / "mixture")
        print(f"{sorted(path.name for path in (folder / 'mixture').iterdir())} in {folder / 'mixture'}")


if __name__ == "__main__":
    main()
