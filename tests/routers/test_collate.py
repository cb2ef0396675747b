"""Batches: what stands where, padding, length limits, and that labels of experts sit where the model predicts."""

import pytest
import torch

from compose.errors import ExamplesError, IncompatibleError
from compose.routers.collate import IGNORED, UNKNOWN, Collator, EncodedMixed, encode_mixed
from compose.routers.context import RoutingContext
from compose.routers.records import MixedExample
from compose.text.encoding import PromptFormat
from compose.text.examples import Example

ROWS = (
    EncodedMixed((11, 12, 13), (21, 2), task_id=0, expert_id=4, cluster_id=7, group=1),
    EncodedMixed((14,), (22, 23, 2), task_id=1, expert_id=UNKNOWN),
    EncodedMixed((15, 16), (2,), task_id=0, expert_id=3),
)


def words(bos: bool = False, eos: bool = False):
    """A tokenizer of the words w0, w1, ...: ids 3 and up; 0 pads, 1 begins, 2 ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(64))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = f"{'<s> ' * bos}$A{' </s>' * eos}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def mixed(prompt: str, response: str, task: str = "a", **more) -> MixedExample:
    return MixedExample(Example(prompt, response), task, **more)


SPACED = PromptFormat("{input}", " </s>")


def encoded(examples, tokenizer=None, encoder_decoder=False, **options) -> list[EncodedMixed]:
    return encode_mixed(examples, tokenizer or words(), SPACED, encoder_decoder=encoder_decoder, **options)


def test_examples_become_numbers() -> None:
    examples = [mixed("w1 w2", "w3", "b", expert="e1", cluster=5, group=0), mixed("w4", "w5 w6")]
    assert encoded(examples, experts=["e0", "e1"]) == [
        EncodedMixed((4, 5), (6, 2), 1, 1, 5, 0),
        EncodedMixed((7,), (8, 9, 2), 0),
    ]
    assert [row.task_id for row in encoded(examples, tasks=["b", "c", "a"])] == [0, 2]
    assert encoded(examples)[0].expert_id == UNKNOWN


def test_all_examples_without_a_number_or_tokens_are_named() -> None:
    examples = [
        mixed("w1", "w2", "b", place="data.jsonl:7"),
        mixed("w1", "w2", expert="maths", place="data.jsonl:8"),
        mixed("w1", "w2"),
        mixed("", "w2"),
    ]
    with pytest.raises(ExamplesError) as error:
        encoded(examples, tasks=["a"], experts=["math"])
    first, second, third = str(error.value).splitlines()
    assert first.startswith("data.jsonl:7: unknown task 'b'")
    assert second.startswith("data.jsonl:8: unknown expert 'maths'; did you mean 'math'")
    assert third == "example 4: has no tokens in its prompt"


def test_too_long_examples_are_refused_by_name_unless_cutting_is_asked_for() -> None:
    examples = [mixed("w1 w2 w3 w4", "w5", place="x:1"), mixed("w1 w2", "w5"), mixed("w1 w2 w3", "w5 w6", place="x:3")]
    with pytest.raises(ExamplesError) as error:
        encoded(examples, max_length=4)
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == ["1", "3"]
    assert "4 prompt and 2 response tokens exceed max_length 4 by 2" in str(error.value)
    rows = encoded(examples, max_length=4, truncate="prompt_left")
    assert [(row.prompt, row.response, row.cut) for row in rows] == [
        ((6, 7), (8, 2), 2), ((4, 5), (8, 2), 0), ((6,), (8, 9, 2), 2),
    ]  # fmt: skip
    assert encoded(examples, max_length=6) == encoded(examples)


def test_cutting_keeps_the_token_that_begins_a_text() -> None:
    examples = [mixed("w1 w2 w3", "w5")]
    assert encoded(examples, words(bos=True))[0].prompt == (1, 4, 5, 6)
    cut = encoded(examples, words(bos=True), max_length=4, truncate="prompt_left")[0]
    assert (cut.prompt, cut.cut) == ((1, 6), 2)
    with pytest.raises(ExamplesError, match="leaves no room for a prompt within max_length 3"):
        encoded(examples, words(bos=True), max_length=3, truncate="prompt_left")
    assert encoded([mixed("", "w5")], words(bos=True), max_length=3)[0].prompt == (1,)


def test_an_encoder_and_a_decoder_have_the_limit_each() -> None:
    tokenizer = words(eos=True)
    rows = encoded([mixed("w1 w2 w3", "w5 w6")], tokenizer, True, max_length=3, truncate="prompt_left")
    assert rows[0].prompt == (5, 6, 2)
    assert rows[0].response == (8, 9, 2)
    with pytest.raises(ExamplesError, match="its response of 4 tokens does not fit into max_length 3"):
        encoded([mixed("w1", "w5 w6 w7")], tokenizer, True, max_length=3, truncate="prompt_left")


@pytest.mark.parametrize("options", [{"max_length": 1}, {"truncate": "left"}])
def test_limits_that_cannot_be(options) -> None:
    with pytest.raises(
        IncompatibleError, match="truncate must be one of refuse, prompt_left and max_length at least 2"
    ):
        encoded([mixed("w1", "w2")], **options)


def test_a_batch_by_hand() -> None:
    batch = Collator(pad_token_id=9, token_labels="response")(ROWS)
    x, u = IGNORED, UNKNOWN
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 2], [14, 22, 23, 2, 9], [15, 16, 2, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert batch.labels.tolist() == [[x, x, x, 21, 2], [x, 22, 23, 2, x], [x, x, 2, x, x]]
    assert batch.prompt_mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert batch.response_mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]
    assert batch.expert_labels_BS.tolist() == [[u, u, 4, 4, u], [u] * 5, [u, 3, u, u, u]]
    assert (batch.task_ids.tolist(), batch.expert_labels.tolist()) == ([0, 1, 0], [4, u, 3])
    assert (batch.cluster_ids.tolist(), batch.groups.tolist()) == ([7, u, u], [1, u, u])
    assert batch.num_targets == 6
    assert batch.position_ids is None
    everything = Collator(pad_token_id=9, token_labels="all")(ROWS)
    assert everything.expert_labels_BS.tolist() == [[4, 4, 4, 4, u], [u] * 5, [3, 3, u, u, u]]


def test_padding_on_the_left_moves_everything_alike() -> None:
    right = Collator(pad_token_id=9, token_labels="all")(ROWS)
    left = Collator(pad_token_id=9, token_labels="all", padding_side="left", multiple=4)(ROWS)
    assert left.input_ids.shape == (3, 8)
    for name in ("input_ids", "labels", "prompt_mask", "response_mask", "expert_labels_BS"):
        for row, length in enumerate((5, 4, 3)):
            assert torch.equal(getattr(left, name)[row, -length:], getattr(right, name)[row, :length])
    assert not left.prompt_mask[:, :3].any()
    assert (left.expert_labels_BS[:, :3] == UNKNOWN).all()
    assert left.position_ids.tolist()[2] == [0, 0, 0, 0, 0, 0, 1, 2]
    assert Collator(pad_token_id=9, padding_side="left", position_ids=False)(ROWS).position_ids is None


def test_an_encoder_decoder_batch_by_hand() -> None:
    batch = Collator(pad_token_id=9, encoder_decoder=True, token_labels="response", multiple=2)(ROWS)
    x, u = IGNORED, UNKNOWN
    assert batch.input_ids.tolist() == [[11, 12, 13, 9], [14, 9, 9, 9], [15, 16, 9, 9]]
    assert batch.labels.tolist() == [[21, 2, x, x], [22, 23, 2, x], [2, x, x, x]]
    assert batch.prompt_mask.int().tolist() == batch.attention_mask.tolist()
    assert batch.response_mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.expert_labels_BS.tolist() == [[4, 4, u, u], [u] * 4, [3, u, u, u]]


@pytest.mark.parametrize(
    ("name", "side"), [("llama", "right"), ("llama", "left"), ("gpt2", "right"), ("gpt2", "left"), ("t5", "right")]
)
def test_labelled_decisions_are_those_the_model_is_trained_on(tiny_model, name, side) -> None:
    """The loss over positions with an expert's label equals the model's own, which shifts its labels by itself."""
    model = tiny_model(name)
    two = name == "t5"
    rows = [row._replace(expert_id=1) for row in ROWS]
    batch = Collator(pad_token_id=0, encoder_decoder=two, padding_side=side, token_labels="response")(rows)
    with torch.no_grad():
        output = model(**batch.model_inputs())
    places = batch.expert_labels_BS == 1
    wanted = batch.labels.roll(0 if two else -1, dims=1)[places]
    torch.testing.assert_close(torch.nn.functional.cross_entropy(output.logits[places], wanted), output.loss)
    assert int(places.sum()) == batch.num_targets


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_side_and_width_change_no_loss(tiny_model, name) -> None:
    model = tiny_model(name)
    losses = []
    for side, multiple in (("right", 1), ("left", 1), ("right", 8), ("left", 8)):
        batch = Collator(pad_token_id=0, padding_side=side, multiple=multiple)(ROWS)
        with torch.no_grad():
            losses.append(model(**batch.model_inputs()).loss)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


def test_what_a_router_is_told() -> None:
    batch = Collator(pad_token_id=0)(ROWS)
    context = RoutingContext(**batch.routing_inputs()).with_inputs(batch.attention_mask, batch.labels)
    assert context.cluster_ids is None  # two rows have none: a gate over clusters has to refuse the batch
    assert torch.equal(context.prompt(3, 5, torch.device("cpu")), batch.prompt_mask)
    assert torch.equal(context.response(3, 5, torch.device("cpu")), batch.response_mask)
    assert context.expert_labels.tolist() == [4, UNKNOWN, 3]
    clustered = Collator(pad_token_id=0, token_labels="all")([row._replace(cluster_id=2) for row in ROWS])
    told = clustered.to("cpu").routing_inputs()
    assert told["cluster_ids"].tolist() == [2, 2, 2]
    assert told["expert_labels"].shape == (3, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_side": "both"}, "padding_side must be left or right"),
        ({"encoder_decoder": True, "padding_side": "left"}, "padded on the right"),
        ({"multiple": 0}, "multiple must be at least 1"),
        ({"token_labels": "some"}, "token_labels must be one of none, response, all"),
    ],
)
def test_impossible_collators(options, message) -> None:
    with pytest.raises(IncompatibleError, match=message):
        Collator(pad_token_id=0, **options)


def test_a_batch_needs_rows() -> None:
    with pytest.raises(IncompatibleError, match="at least one row"):
        Collator(pad_token_id=0)([])
