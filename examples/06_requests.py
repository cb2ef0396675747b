"""Requests for different adapters, weighted sets or none: as one batch, and as rows that join and leave a running one.

Prints one line per row of the batch, then every request of the running batch as it finishes, with the step it came in.
"""

import compose
from compose.demo.assets import demo_bank, demo_base
from compose.engine.requests import Request, RunningBatch
from compose.fewshot.loading import load_model

WANTED = [
    ("stone river lamp", "capitals"),
    ("a cold wind over the hills", {"capitals": 1.0, "dashes": 1.0}),
    ("lamp", None),
    ("one two three four", "reverse_order"),
    ("red green blue", "initials"),
    ("north south", {"capitals": 1.0, "commas": 1.0}),
]


def main() -> None:
    """Run the example."""
    model, tokenizer, prompt_format = load_model(demo_base())
    prompts = [tokenizer(prompt_format.prompt_template.format(input=f"Do it: {text}")).input_ids for text, _ in WANTED]
    adapters = [adapter for _, adapter in WANTED]
    with compose.attach(model, compose.Bank.open(demo_bank())) as attached:
        rows = attached.generate(prompts, adapters, max_new_tokens=32)
        together = tokenizer.batch_decode(rows, skip_special_tokens=True)
        for adapter, text in zip(adapters, together, strict=True):
            print(f"{adapter}: {text}")

        # Three places; a request arrives with every fifth step, while others are in the middle of theirs.
        batch = RunningBatch(attached, max_rows=3)
        waiting = [
            Request(prompt, adapter, 32, id=number)
            for number, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True))
        ]
        step = 0
        while waiting or batch.running or batch.waiting:
            if waiting and step % 5 == 0:
                batch.add(waiting.pop(0))
            step += 1
            for finished in batch.step():
                number, text = finished.request.id, tokenizer.decode(finished.tokens, skip_special_tokens=True)
                same = "the same text" if text == together[number] else f"ANOTHER TEXT: {text}"
                print(f"step {step}: request {number} is done ({finished.reason}), {same}")


if __name__ == "__main__":
    main()
