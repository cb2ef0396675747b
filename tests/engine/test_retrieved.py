"""retrieve_and_generate: rows get what they get alone, the formulas are LoraRetriever's, and errors come early."""

import numpy as np
import pytest
import torch
from torch import nn

import compose
from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.coefficients import AdapterIds, Coefficients
from compose.engine.retrieved import retrieved_selection, selection_of
from compose.errors import IncompatibleError, UnknownNameError
from compose.retriever.composition import Composer, allowed, first_of
from compose.retriever.retriever import Retrieved, Retriever
from compose.text.encoding import PromptFormat

NAMES = ("expert-2", "expert-0", "expert-3", "expert-1")  # not the bank's order
TEXTS = ["f j l 5", "h", "q r s t", "5 j f", "z z z z z"]
SCORES = {
    "f j l 5": [0.9, 0.2, 0.7, 0.3],
    "h": [0.1, 0.4, 0.3, 0.2],
    "q r s t": [-0.9, -0.4, -0.3, -0.2],
    "5 j f": [0.5, 0.5, 0.6, 0.5],
    "z z z z z": [0.1, 0.2, 0.9, 0.8],
}


class Fixed:
    """A retriever that knows its scores; counts how often it is asked."""

    def __init__(self, names=NAMES) -> None:
        self.names = names
        self.calls = 0

    def scores(self, texts):
        self.calls += 1
        return np.array([SCORES[text] for text in texts], dtype=np.float32)

    def top(self, texts, k=3, exclude=None):
        scores = np.where(allowed(self.names, len(texts), exclude), self.scores(texts), -np.inf)
        indices, best = first_of(scores, k)
        return Retrieved((), indices, best, np.zeros(len(texts), bool))


class Letters:
    """A tokenizer: one token per character that is no space; what a decoder-only model gets ends in no end token."""

    eos_token, eos_token_id = "<eos>", 2

    def __call__(self, text, add_special_tokens=True):
        tokens = [2 if part == "<eos>" else 3 + ord(part[0]) % 60 for part in text.replace("<eos>", " <eos>").split()]
        return type("Encoding", (), {"input_ids": tokens})()

    def batch_decode(self, rows, skip_special_tokens=False):
        return [" ".join(map(str, row)) for row in rows]


@pytest.fixture
def llama(tiny_model, make_bank):
    model = tiny_model("llama")
    with compose.attach(model, make_bank(model)) as attached:
        yield attached


def generate(attached, texts=TEXTS, **options):
    options = {"tokenizer": Letters(), "max_new_tokens": 6, **options}
    return compose.retrieve_and_generate(attached, options.pop("retriever", Fixed()), texts, **options)


MODES = {
    "selection": {"mode": "selection", "threshold": 0.0},
    "fusion": {"mode": "fusion", "k": 3, "threshold": 0.0},
    "mixture": {"mode": "mixture", "k": 2, "weights": "similarity", "temperature": 0.3},
    "all of them": {"mode": "fusion", "k": None, "weights": "similarity"},
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_every_row_gets_what_it_gets_alone(tiny_model, make_bank, name) -> None:
    model, found = tiny_model(name), {}
    with compose.attach(model, make_bank(model)) as attached:
        for label, options in MODES.items():
            retriever = Fixed()
            together = found[label] = generate(attached, retriever=retriever, **options)
            assert retriever.calls == 1
            for row, text in enumerate(TEXTS):
                alone = generate(attached, [text], **options)
                assert alone.rows == [together.rows[row]]
                assert alone.texts == [together.texts[row]]
        assert attached.active is None
        bare = Letters().batch_decode(attached.generate([Letters()("q r s t").input_ids], max_new_tokens=6))
    assert found["selection"].texts[2] == found["fusion"].texts[2] == bare[0]  # nothing scores 0 or more
    assert found["selection"].rows[2] == {}
    assert len({text for result in found.values() for text in result.texts}) >= 6


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2", "bert"])
@pytest.mark.parametrize("mode", ["selection", "fusion", "mixture"])
def test_logits_of_a_row_are_those_of_its_adapters_alone(tiny_model, make_bank, run_model, name, mode) -> None:
    model = tiny_model(name).double()
    with compose.attach(model, make_bank(model)) as attached, torch.no_grad():
        options = {"mode": mode, "k": 3, "threshold": 0.0, "weights": "similarity"}
        with attached.using(retrieved_selection(attached, Fixed(), TEXTS, **options)):
            together = run_model(model, rows=5)
        for row, weights in enumerate(Composer(**options)(Fixed(), TEXTS).rows()):
            values = torch.tensor([weights.get(expert, 0.0) for expert in attached.bank.names])
            combine = "parameters" if mode == "fusion" else "outputs"
            with attached.using(Coefficients(values, combine)):
                torch.testing.assert_close(together[row], run_model(model, rows=5)[row], atol=1e-9, rtol=1e-9)


def layer_bank(scalings) -> tuple[nn.Module, Bank]:
    """A linear layer of width 12 -> 9 in float64, and adapters of rank 4 over it."""
    generator = torch.Generator().manual_seed(7)
    model = nn.Sequential(nn.Linear(12, 9)).double()
    adapters = []
    for name, scaling in zip(sorted(NAMES), scalings, strict=True):
        a, b = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((4, 12), (9, 4)))
        adapters.append(Adapter(name, "tiny", {"0": LowRank(a, b, scaling)}))
    return model, Bank.from_adapters(adapters)


def loraretriever(bank: Bank, mapping_bp, x_bld, mode: str, scaling) -> torch.Tensor:
    """``lora_mapping``'s forward of LoraRetriever's patched PEFT, written out; ``scaling``: a number, or ``(p,)``."""
    a_prd = torch.stack([bank[name].targets["0"].a for name in bank.names])
    b_pdr = torch.stack([bank[name].targets["0"].b for name in bank.names])
    if mode == "fusion":
        a_brd = torch.einsum("bp,prd->brd", mapping_bp, a_prd)
        b_bdr = torch.einsum("bp,pdr->bdr", mapping_bp, b_pdr)
        return scaling * torch.einsum("blr,bdr->bld", torch.einsum("bld,brd->blr", x_bld, a_brd), b_bdr)
    h_blpr = torch.einsum("bld,prd->blpr", x_bld, a_prd)
    return torch.einsum("blpd,bp->bld", torch.einsum("blpr,pdr->blpd", h_blpr, b_pdr), mapping_bp * scaling)


def mapping(k: int, bank: Bank) -> torch.Tensor:
    """``M / k``: 1/k for the k adapters of every text."""
    rows = torch.zeros(len(TEXTS), len(bank), dtype=torch.float64)
    for row, text in enumerate(TEXTS):
        for place in np.argsort(-np.array(SCORES[text]), kind="stable")[:k]:
            rows[row, bank.index(NAMES[place])] = 1 / k
    return rows


@pytest.mark.parametrize("mode", ["fusion", "mixture"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_batch_formula_is_loraretrievers(mode, k) -> None:
    model, bank = layer_bank([1.5] * 4)
    x_bld = torch.randn(5, 3, 12, dtype=torch.float64)
    base = model(x_bld)
    with compose.attach(model, bank) as attached:
        selection = retrieved_selection(attached, Fixed(), TEXTS, mode=mode, k=k)
        with attached.using(selection):
            found = model(x_bld) - base
    # weights are float32: 1/3 is exact to 6e-8 of itself
    torch.testing.assert_close(found, loraretriever(bank, mapping(k, bank), x_bld, mode, 1.5), rtol=1e-6, atol=1e-6)


def test_every_adapter_keeps_its_own_scaling_where_loraretriever_takes_the_last_ones() -> None:
    scalings = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    model, bank = layer_bank(scalings.tolist())
    x_bld = torch.randn(5, 3, 12, dtype=torch.float64)
    base = model(x_bld)
    with compose.attach(model, bank) as attached:
        for mode in ("fusion", "mixture"):
            with attached.using(retrieved_selection(attached, Fixed(), TEXTS, mode=mode, k=3)):
                found = model(x_bld) - base
            m_bp, exact = mapping(3, bank), {"rtol": 1e-6, "atol": 1e-6}
            if mode == "mixture":
                right = loraretriever(bank, m_bp, x_bld, mode, scalings)
            else:  # the root of the scaling goes into both factors, so that one adapter alone is itself
                right = loraretriever(bank, m_bp * scalings.sqrt(), x_bld, mode, 1.0)
            torch.testing.assert_close(found, right, **exact)
            with pytest.raises(AssertionError, match="not close"):
                torch.testing.assert_close(found, loraretriever(bank, m_bp, x_bld, mode, scalings[-1]), **exact)


def test_single_adapters_need_ids_only_and_rejected_rows_none(llama) -> None:
    selection = retrieved_selection(llama, Fixed(), TEXTS, threshold=0.0)
    assert isinstance(selection, AdapterIds)
    assert selection.ids.tolist() == [2, 0, -1, 3, 3]
    assert retrieved_selection(llama, Fixed(), TEXTS, threshold=2.0) is None
    sparse = retrieved_selection(llama, Fixed(), TEXTS, mode="mixture", k=2, threshold=0.25)
    assert sparse.indices.tolist() == [[2, 3], [0, 3], [-1, -1], [3, 2], [3, 1]]
    assert sparse.values.tolist() == [[0.5, 0.5], [0.5, 0.5], [0, 0], [0.5, 0.5], [0.5, 0.5]]
    composed = Composer(mode="fusion", k=2)(Fixed(), TEXTS)
    assert selection_of(llama, composed).combine == "parameters"


def test_a_text_gets_no_adapter_that_is_excluded_for_it(llama) -> None:
    exclude = ["expert-2", None, None, ["expert-3", "expert-2", "expert-0"], []]
    found = generate(llama, exclude=exclude)
    assert [list(row) for row in found.rows] == [["expert-3"], ["expert-0"], ["expert-1"], ["expert-1"], ["expert-3"]]
    selection = retrieved_selection(llama, Fixed(), TEXTS, exclude=exclude)
    assert selection.ids.tolist() == [3, 0, 1, 1, 3]


def test_soup_is_one_set_for_the_batch(llama) -> None:
    found = generate(llama, mode="soup", k=2)
    assert found.rows == [{"expert-3": 0.5, "expert-1": 0.5}] * 5
    values = torch.tensor([0.0, 0.5, 0.0, 0.5])
    with llama.using(Coefficients(values, "parameters")):
        rows = llama.generate([Letters()(text).input_ids for text in TEXTS], max_new_tokens=6)
    assert found.texts == Letters().batch_decode(rows)


def test_soup_over_raw_means_takes_what_soup_weights_takes() -> None:
    """`compose.soup_weights` over vectors, and the retriever's mode over texts: AdapterSoup both times."""
    generator = np.random.default_rng(5)
    texts = {name: [f"{name} {number}" for number in range(4)] for name in (*NAMES, "query")}
    vectors = {text: generator.standard_normal(6) for own in texts.values() for text in own}
    encoder = Vectors({text: (row / np.linalg.norm(row)).astype(np.float32) for text, row in vectors.items()})
    retriever = Retriever.fit(encoder, {name: texts[name] for name in NAMES}, "raw_mean")
    wanted = compose.soup_weights(
        encoder.encode(texts["query"]), {name: encoder.encode(texts[name]) for name in NAMES}, 2, similarity="mean"
    )
    (row, *others) = Composer(mode="soup", k=2)(retriever, texts["query"]).rows()
    assert list(row.items()) == list(wanted.items())
    assert others == [row] * 3


class Vectors:
    """An encoder that knows the vector of every text."""

    id, prompt, fingerprint, dim = "vectors", "", "0" * 64, 6

    def __init__(self, known) -> None:
        self.known = known

    def encode(self, texts):
        return np.stack([self.known[text] for text in texts])


def test_rows_may_run_in_parts(llama) -> None:
    for mode in ("mixture", "soup"):
        whole = generate(llama, mode=mode)
        assert [generate(llama, mode=mode, batch_size=size) for size in (1, 2, 5, 9)] == [whole] * 4


def test_prompt_format_stop_ids_and_options_reach_the_model(llama) -> None:
    plain = generate(llama)
    framed = PromptFormat("f {input} h", "5")
    other = generate(llama, prompt_format=framed)
    assert other.rows == plain.rows  # the retriever reads the text as it is
    assert other.texts != plain.texts
    first = int(plain.texts[0].split()[0])
    assert generate(llama, stop_ids=[first]).texts[0] == ""
    suffix = next(letter for letter in map(chr, range(33, 127)) if 3 + ord(letter) % 60 == first)
    ended = generate(llama, prompt_format=PromptFormat("{input}", suffix))
    assert ended.texts[0] == ""
    beams = generate(llama, num_beams=2, num_return_sequences=2)
    assert (len(beams.texts), len(beams.rows)) == (10, 5)


def test_what_was_in_force_is_back_afterwards(llama) -> None:
    llama.set("expert-1")
    before = llama.active
    generate(llama, mode="fusion")
    assert llama.active is before


def test_paged_banks_retrieve_too(tiny_model, make_bank) -> None:
    from compose.engine.paging import attach_paged

    model = tiny_model("llama")
    bank = make_bank(model)
    with compose.attach(model, bank) as attached:
        wanted = generate(attached, mode="mixture", k=2)
    with attach_paged(model, bank, slots=4) as paged:
        assert generate(paged, mode="mixture", k=2) == wanted


def test_the_tokenizer_saved_beside_the_model_is_the_default() -> None:
    from compose.demo.assets import demo_bank, demo_base
    from compose.fewshot.loading import load_model

    loaded, texts = load_model(demo_base()), ["Do it: stone river lamp", "Do it: cold wind"]
    retriever = Fixed(("capitals", "reverse_order", "initials", "commas"))
    retriever.scores = lambda given: np.array([[1, 0, 0, 0], [0, 1, 0, 0]], dtype=np.float32)
    with compose.attach(loaded.model, Bank.open(demo_bank())) as attached:
        found = compose.retrieve_and_generate(attached, retriever, texts, max_new_tokens=32)
    assert found.texts == ["STONE RIVER LAMP", "wind cold"]


def test_adapters_that_the_bank_lacks_are_refused_whether_retrieved_or_not(llama) -> None:
    lacking = Fixed(("expert-0", "math", "expert-1", "code"))
    words = r"ranks 4 adapters, of which the bank \(4 adapters\) lacks 'math', 'code'; attach the bank"
    for call in (generate, lambda attached, retriever: retrieved_selection(attached, retriever, TEXTS)):
        with pytest.raises(IncompatibleError, match=words):
            call(llama, retriever=lacking)


def test_a_retriever_of_a_part_of_the_bank_serves(llama) -> None:
    part = Fixed(("expert-3",))
    part.scores = lambda texts: np.zeros((len(texts), 1), np.float32)
    assert generate(llama, retriever=part, mode="mixture").rows == [{"expert-3": 1.0}] * 5


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mode": "average"}, UnknownNameError, "unknown mode 'average'"),
        ({"weights": "softmax"}, UnknownNameError, "unknown weights"),
        ({"k": 0}, IncompatibleError, "k must be"),
        ({"batch_size": 0}, IncompatibleError, "batch_size must be at least 1"),
        ({"texts": []}, IncompatibleError, "at least one text"),
        ({"texts": "f j l 5"}, IncompatibleError, "got one string"),
        ({"texts": ["f j l 5", " "]}, IncompatibleError, "row 1 has no tokens|no tokens"),
        ({"exclude": ["expert-9"] * 5}, UnknownNameError, "expert-9"),
        ({"tokenizer": None}, IncompatibleError, "give tokenizer="),
        ({"attention_mask": None}, IncompatibleError, "attention_mask"),
    ],
)
def test_bad_calls_are_refused(llama, monkeypatch, options, error, words) -> None:
    monkeypatch.setitem(SCORES, " ", [0.0] * 4)
    with pytest.raises(error, match=words):
        generate(llama, **options)
    assert llama.active is None


def test_a_model_that_does_not_generate_is_refused(tiny_model, make_bank) -> None:
    model = tiny_model("bert")
    with (
        compose.attach(model, make_bank(model)) as attached,
        pytest.raises(IncompatibleError, match="does not generate"),
    ):
        generate(attached)
