"""A router over a bank of trained adapters: without training, trained on mixed data, saved and opened again.

Prints how many of 20 items of four tasks come out right for the uniform average, a training-free router, one gate per
prompt trained for 40 steps, and the adapters of the tasks themselves; what the trained gate makes of four prompts; and
whether the saved mixture writes the same texts. Nobody tells the router the task: it reads the prompt.
"""

import tempfile

import torch

import compose
from compose import routers
from compose.demo.assets import demo_bank, demo_base
from compose.demo.tasks import TASKS, test_items
from compose.engine.routed import open_routed
from compose.fewshot.loading import load_model
from compose.text.examples import Example

NAMES = ("capitals", "reverse_order", "initials", "commas")


def main() -> None:
    """Run the example."""
    torch.set_num_threads(1)  # the demo model is too small for a second thread to pay
    loaded, bank = load_model(demo_base()), compose.Bank.open(demo_bank()).select(NAMES)
    records = [
        routers.MixedExample(Example(item.input, item.output), name, expert=name)
        for name in NAMES
        for item in TASKS[name].sample("router", 24)
    ]
    items = [(name, item) for name in NAMES for item in test_items(TASKS[name], 5)]
    template = loaded.prompt_format.prompt_template
    prompts = [loaded.tokenizer(template.format(input=item.input)).input_ids for _, item in items]

    def report(label: str, rows: list[list[int]]) -> list[str]:
        texts = loaded.tokenizer.batch_decode(rows, skip_special_tokens=True)
        right = sum(text == item.output for text, (_, item) in zip(texts, items, strict=True))
        print(f"{label}: {right} of {len(items)} right, the first is {texts[0]!r}")
        return texts

    with compose.attach(loaded.model, bank) as attached:
        for name in ("linear_fusion", "spectr"):
            routed = routers.build(attached, routers.preset(name))
            report(f"{name} (nothing is trained)", routed.generate(prompts, max_new_tokens=32))
            routed.remove()

        # MOA's gate, here one for all layers: it reads the prompt as the bare base model sees it.
        spec = routers.preset("moa", site="model", gate_input="first_pass")
        routed = routers.train(
            attached, spec, records, tokenizer=loaded.tokenizer, prompt_format=loaded.prompt_format,
            steps=40, batch_size=8, learning_rate=1e-2,
        ).routed  # fmt: skip
        texts = report("moa, 40 steps", routed.generate(prompts, max_new_tokens=32))
        report("the task's own adapter", attached.generate(prompts, [name for name, _ in items], max_new_tokens=32))

        routed.enable()  # attached.generate had put the adapters into force
        for (_, item), prompt in list(zip(items, prompts, strict=True))[::5]:
            with torch.no_grad(), routed.recording() as decisions:
                routed(input_ids=torch.tensor([prompt]))
            gates = ", ".join(f"{gate:.2f}" for gate in decisions[0].probs_NE[0].tolist())
            print(f"{item.input!r}: {gates} for {', '.join(bank.names)}")

        folder = tempfile.mkdtemp()
        routers.save(routed, folder + "/mixture")

    opened = open_routed(load_model(demo_base()).model, compose.Bank.open(demo_bank()), folder + "/mixture")
    again = loaded.tokenizer.batch_decode(opened.generate(prompts, max_new_tokens=32), skip_special_tokens=True)
    print("saved and opened over the whole bank:", "the same texts" if again == texts else "OTHER TEXTS")


if __name__ == "__main__":
    main()
