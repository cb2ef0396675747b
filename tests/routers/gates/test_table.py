"""Tables of scores: given, learned, by task or cluster; rows of unknown numbers."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape, describe, from_description
from compose.routers.context import RoutingContext
from compose.routers.gates.embedding import EmbeddingGate
from compose.routers.gates.rows import rows_of_table
from compose.routers.gates.table import TableGate
from compose.routers.steps import GATES, Seen


def shape(tasks=3, clusters=0, experts=4, seed=0):
    return SiteShape(
        name="model", layer=-1, num_layers=2, in_features=0, experts=tuple("abcd"[:experts]),
        available_E=torch.ones(experts, dtype=torch.bool), stacks={}, num_tasks=tasks, num_clusters=clusters,
        text_features=0, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def seen(ids=None):
    return Seen(None, ids, None, None, RoutingContext(), training=False)


def test_one_row_for_all_inputs() -> None:
    gate = TableGate(values=(0.1, 0.2, 0.3, 0.4)).build(shape())
    torch.testing.assert_close(gate(seen()), torch.tensor([0.1, 0.2, 0.3, 0.4]))


def test_a_row_for_each_task() -> None:
    gate = TableGate(rows="tasks", init="uniform", bound=0.5).build(shape())
    assert gate.table_NE.shape == (3, 4)
    assert gate.table_NE.detach().abs().max() <= 0.5
    torch.testing.assert_close(gate(seen(torch.tensor([2, 0]))), gate.table_NE[[2, 0]])


def test_an_embedding_and_a_linear_map() -> None:
    gate = EmbeddingGate(of="clusters", width=5, bias=True).build(shape(clusters=6))
    with torch.no_grad():
        gate.bias_E.normal_()
    expected = gate.table_ND[[4, 5]] @ gate.weight_ED.T + gate.bias_E
    torch.testing.assert_close(gate(seen(torch.tensor([4, 5]))), expected)


def test_the_unknown_number_reads_the_mean() -> None:
    table = torch.arange(6.0).reshape(3, 2)
    rows = rows_of_table(table, torch.tensor([-1, 1]), "tasks")
    torch.testing.assert_close(rows, torch.tensor([[2.0, 3.0], [2.0, 3.0]]))


@pytest.mark.parametrize("number", [-2, 3])
def test_other_numbers_are_refused(number) -> None:
    with pytest.raises(IncompatibleError, match=r"\[0, 3\)"):
        rows_of_table(torch.zeros(3, 2), torch.tensor([0, number]), "tasks")


def test_numbers_must_be_said() -> None:
    with pytest.raises(IncompatibleError, match="gate_input"):
        rows_of_table(torch.zeros(3, 2), None, "tasks")


@pytest.mark.parametrize("gate", [TableGate(rows="clusters"), EmbeddingGate(of="clusters")])
def test_tables_need_known_numbers(gate) -> None:
    with pytest.raises(IncompatibleError, match="clusters="):
        gate.build(shape(clusters=0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: TableGate(rows="rows"), lambda: TableGate(init="ones"), lambda: TableGate(bound=-1.0),
        lambda: EmbeddingGate(width=0), lambda: EmbeddingGate(of="rows"),
        lambda: TableGate(values=(1.0,)).build(shape()),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(make) -> None:
    with pytest.raises(IncompatibleError):
        make()


@pytest.mark.parametrize("gate", [TableGate(values=(1.0, 2.0)), TableGate(rows="tasks"), EmbeddingGate(width=3)])
def test_descriptions_round_trip(gate) -> None:
    assert from_description(GATES, describe(GATES, gate)) == gate
