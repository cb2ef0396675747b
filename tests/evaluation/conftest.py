"""The demo's base model, three of its adapters, and a few records of their tasks."""

import pytest

from compose.bank import Bank
from compose.demo.assets import demo_bank, demo_base
from compose.demo.tasks import TASKS
from compose.engine.attach import attach
from compose.fewshot.loading import load_model
from compose.routers.builder import build
from compose.routers.records import MixedExample
from compose.text.examples import Example

EXPERTS = ("sum", "add_one", "largest")


@pytest.fixture(scope="session")
def loaded():
    return load_model(demo_base())


@pytest.fixture(scope="session")
def bank() -> Bank:
    return Bank.open(demo_bank()).select(EXPERTS)


@pytest.fixture(scope="session")
def records():
    """Return a factory: so many records of each task, labelled with their adapter."""

    def make(count: int, *tasks: str, split: str = "test", labelled: bool = True) -> list[MixedExample]:
        return [
            MixedExample(Example(item.input, item.output), task, expert=task if labelled else None)
            for task in tasks or EXPERTS
            for item in TASKS[task].sample(0, count, split)
        ]

    return make


@pytest.fixture
def routed(loaded, bank):
    """Return a factory of mixtures over the bank, in evaluation mode; they are taken off at the end."""
    handles = []

    def make(spec, *, over: Bank | None = None, **more):
        handles.append(attach(loaded.model, over or bank))
        return build(handles[-1], spec, **more).eval()

    yield make
    for handle in handles:
        if handle.model is not None and handle._attached:
            handle.detach()
