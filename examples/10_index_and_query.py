"""An index over the demo's bank, offline: take adapters in, say what they do, find them by words, open what was found.

Prints what became of the 36 folders, the best adapters for a text, what the index knows of the first, what the model
writes with it, and that a changed file is noticed.
"""

import json
import shutil
import tempfile
from pathlib import Path

import compose
from compose.demo.assets import demo_bank, demo_base
from compose.demo.tasks import TASKS
from compose.engine.generate import generate_tokens
from compose.fewshot.loading import load_model
from compose.hub_index import Index
from compose.hub_index.audit import BaseModel
from compose.hub_index.descriptions import add_descriptions
from compose.hub_index.ingest import Options, add_tree
from compose.hub_index.verify import verify


def describe(names: list[str], path: Path) -> Path:
    """Write a JSONL of descriptions: one line per adapter, with a few of its task's inputs."""
    with path.open("w") as stream:
        for name in names:
            inputs = [item.input for item in TASKS[name].sample("index", 5)]
            record = {"name": name, "summary": TASKS[name].description, "license": "apache-2.0", "examples": inputs}
            stream.write(json.dumps(record) + "\n")
    return path


def main() -> None:
    """Run the example."""
    model, tokenizer, prompt_format = load_model(demo_base())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "bank"
        shutil.copytree(demo_bank(), folder)
        with Index.open(Path(place) / "adapters.db", create=True) as index:
            outcomes = add_tree(index, folder, Options(base=BaseModel.open(demo_base())))
            states = [outcome.state for outcome in outcomes]
            print({state: states.count(state) for state in sorted(set(states))})
            add_descriptions(index, describe([one.name for one in outcomes], Path(place) / "told.jsonl"), Options())

            hits = index.query("sort the words", base="compose-demo-base", rank=(1, 16), license="apache-2.0", k=3)
            print([(hit.adapter.name, round(hit.score, 2)) for hit in hits])
            record = index.get(hits[0].adapter.name)
            print(
                f"{record.name}: {record.summary!r}, {len(record.modules)} modules, {record.num_params:,} parameters"
            )

            bank = compose.Bank.from_index(index, query="sort the words", base="compose-demo-base", k=3)
            with compose.attach(model, bank) as attached, attached.using(bank.names[0]):
                text = prompt_format.prompt_template.format(input="Sort the words: stone river lamp")
                (row,) = generate_tokens(
                    model, [tokenizer(text).input_ids], max_new_tokens=32, stop_ids=[tokenizer.eos_token_id]
                )
            print(f"{bank.names[0]}: {tokenizer.decode(row)}")

            config = folder / record.name / "adapter_config.json"
            config.write_text(config.read_text() + "\n")
            print([(one.name, one.state) for one in verify(index) if one.state != "ok"])


if __name__ == "__main__":
    main()
