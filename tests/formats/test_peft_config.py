"""Ranks, scalings and targets from the configuration: PEFT's rules, and no pattern of a file is ever run."""

import math
import os
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.errors import AdapterFormatError
from compose.formats.peft import read_adapter
from compose.formats.peft_config import check_targets, parse_config, parse_pattern
from compose.formats.peft_write import exact_alpha

KEYS = [
    "q",
    "a.q",
    "layers.0.q",
    "^m.layers.0.q",
    r"^m\.layers\.0\.q",
    r"layers\.0\.q",
    "ayers.0.q",
    "l.0.q",
    "q$",
    "^q",
    "m",
    "layers.0",
    "layersX0.q",
    "......0.q",
    "^",
    r"m-1\.q",
    r"m\-1\.q",
    "^m.layers.10.q$",
    "0.q",
    "..q",
    "",
]
PATHS = ["q", "a.q", "b.a.q", "m.layers.0.q", "m.layers.10.q", "m.layersX0.q", "m-1.q", "x.m.layers.0.q", "m", "aq"]


@pytest.mark.parametrize("key", KEYS)
def test_literal_keys_match_as_in_peft(key):
    other = pytest.importorskip("peft.utils.other")
    for path in PATHS:
        missing = object()
        theirs = other.get_pattern_key([key], path) == key and path != key
        theirs = theirs or (path == key and other.get_pattern_key([key, missing], path) == key)
        assert parse_pattern(key).matches(path) == theirs, (key, path)


@given(st.text(alphabet="mq.0^\\-", max_size=6), st.text(alphabet="mq0-", min_size=1, max_size=3), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_literal_key_matches_as_in_peft(key, segment, deep):
    import re

    pattern = parse_pattern(key)
    if pattern.literal is None:
        return
    path = f"m.{segment}.0.q" if deep else segment
    assert pattern.matches(path) == bool(re.match(rf"(.*\.)?({key})$", path)), (key, path)


@pytest.mark.parametrize("key", [r".*q", "(q|v)_proj", r"layers\.\d+\.q", "q+", "[qv]", "q{2}", r"\w", "a^b", "q\\"])
def test_regular_expressions_are_recognised(key):
    assert parse_pattern(key).literal is None
    with pytest.raises(ValueError, match="not run"):
        parse_pattern(key).matches("q")


def scaling_of(folder, path="m.layers.0.q"):
    return read_adapter(folder).targets[path].scaling


def test_scaling_is_alpha_over_rank(make_folder):
    assert scaling_of(make_folder("plain")) == 2.0
    assert scaling_of(make_folder("rslora", use_rslora=True)) == 4 / math.sqrt(2)
    assert scaling_of(make_folder("negative", lora_alpha=-1)) == -0.5
    assert scaling_of(make_folder("zero", lora_alpha=0)) == 0.0
    assert scaling_of(make_folder("fraction", lora_alpha=0.3)) == 0.15


def test_the_first_matching_alpha_wins(make_folder):
    first = {"layers.0.q": 6, "q": 10}
    last = {"q": 10, "layers.0.q": 6}
    assert scaling_of(make_folder("first", alpha_pattern=first)) == 3.0
    assert scaling_of(make_folder("last", alpha_pattern=last)) == 5.0
    assert scaling_of(make_folder("other", alpha_pattern=first), "m.layers.1.q") == 5.0
    assert scaling_of(make_folder("none", alpha_pattern=first), "m.layers.1.v") == 2.0


def test_a_regular_expression_in_alpha_pattern_is_refused_where_it_matters(make_folder):
    with pytest.raises(AdapterFormatError, match=r"alpha_pattern key '\.\*q' is a regular expression.*4, 8"):
        read_adapter(make_folder("matters", alpha_pattern={".*q": 8}))
    assert scaling_of(make_folder("same", alpha_pattern={".*q": 4})) == 2.0
    assert scaling_of(make_folder("settled", alpha_pattern={"q": 8, "v": 8, "(.*)+x": 9})) == 4.0


def test_ranks_come_from_the_tensors_and_must_fit_the_configuration(make_folder, tensors):
    read_adapter(make_folder("regex", r=64, rank_pattern={".*": 2}))
    read_adapter(make_folder("literal", r=64, rank_pattern={"q": 2, "v": 2}))
    with pytest.raises(AdapterFormatError, match=r"m\.layers\.0\.q: its tensors have rank 2.*says 64"):
        read_adapter(make_folder("r", r=64))
    with pytest.raises(AdapterFormatError, match=r"m\.layers\.0\.q: its tensors have rank 2.*says 3"):
        read_adapter(make_folder("pattern", rank_pattern={"q": 3}))


@pytest.mark.parametrize(
    "field", ["target_modules", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_pattern"]
)
@pytest.mark.parametrize("pattern", ["(([a-z0-9_.])+)+X", "(a|a)*$", r"(.*)*\1", "(" * 50])
def test_no_pattern_of_a_file_is_run(field, pattern, make_folder):
    started = time.process_time()
    fields = {
        field: {pattern: 4 if field == "alpha_pattern" else 2}
        if field.endswith("k_pattern") or field == "alpha_pattern"
        else pattern
    }
    read_adapter(make_folder("x", **fields))
    assert time.process_time() - started < 1


def test_targets_of_a_list_must_be_met_and_complete(make_folder):
    with pytest.raises(AdapterFormatError, match="target_modules names 'k', but no tensor"):
        read_adapter(make_folder("unmet", target_modules=["q", "v", "k"]))
    with pytest.raises(AdapterFormatError, match=r"tensors for m\.layers\.0\.v, which target_modules does not list"):
        read_adapter(make_folder("unlisted", target_modules=["q"]))
    with pytest.raises(AdapterFormatError, match=r"tensors for m\.layers\.0\.v, which exclude_modules excludes"):
        read_adapter(make_folder("excluded", exclude_modules=["0.v"]))
    read_adapter(make_folder("string", target_modules="nothing like it"))
    read_adapter(make_folder("absent", target_modules=None))
    read_adapter(make_folder("longer", target_modules=["layers.0.q", "1.q", "v"]))


def test_layers_to_transform_must_agree_with_the_tensors(make_folder):
    read_adapter(make_folder("both", layers_to_transform=[0, 1]))
    read_adapter(make_folder("named", layers_to_transform=[0, 1], layers_pattern="layers"))
    with pytest.raises(AdapterFormatError, match=r"m\.layers\.1\.q, which layers_to_transform \[0\] leaves out"):
        read_adapter(make_folder("one", layers_to_transform=0))
    with pytest.raises(AdapterFormatError, match="layers_to_transform names layer 2, but no tensor"):
        read_adapter(make_folder("three", layers_to_transform=[0, 1, 2]))


@pytest.mark.parametrize("names", [None, "layers", ["layers"], ["blocks", "h"], ["m.layers"]])
@pytest.mark.parametrize(
    "path",
    [
        "h.0.q",
        "a.h.0.q",
        "layers.0.q",
        "m.layers.0.q",
        "m.layers.1.q",
        "m.layers.0.experts.1.q",
        "m.layers.1.x.0.q",
        "m.q.0",
    ],
)
def test_layers_are_counted_as_in_peft(names, path):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    fields = {"target_modules": ["q", "0"], "layers_to_transform": [0], "layers_pattern": names}
    ours = check_targets(parse_config({"peft_type": "LORA", **fields}), [path])
    theirs = check_target_module_exists(peft.LoraConfig(**fields), path)
    assert bool(theirs) == (not [problem for problem in ours if "leaves out" in problem])


def test_modules_to_save_must_be_in_the_file(make_folder, tensors):
    with pytest.raises(AdapterFormatError, match="modules_to_save names 'score', but no tensor"):
        read_adapter(make_folder("none", modules_to_save=["score"]))
    tensors["base_model.model.score.weight"] = torch.ones(3, 6)
    read_adapter(make_folder("there", tensors, modules_to_save=["score"]))
    with pytest.raises(AdapterFormatError, match=r"score\.weight is used by nothing"):
        read_adapter(make_folder("unlisted", tensors))


VARIANTS = {
    "use_dora": True,
    "lora_bias": True,
    "use_qalora": True,
    "use_bdlora": {"x": 1},
    "layer_replication": [[0, 1]],
    "target_parameters": ["experts.w"],
    "trainable_token_indices": [0],
    "alora_invocation_tokens": [5],
    "arrow_config": {"top_k": 2},
    "velora_config": {"x": 1},
    "monteclora_config": {"x": 1},
    "kasa_config": {"x": 1},
    "bias": "all",
    "enable_lora": [False],
    "use_something_new": True,
    "something_new_config": {"x": 1},
}


@pytest.mark.parametrize("field", sorted(VARIANTS))
def test_every_variant_is_refused_by_name_with_a_next_step(field, make_folder):
    with pytest.raises(AdapterFormatError, match=f"adapter_config.json: .*{field}.*[:;] .{{20,}}"):
        read_adapter(make_folder("x", **{field: VARIANTS[field]}))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "loftq", "lora_ga", "mica", 3])
def test_initialisations_that_change_the_base_are_refused(init, make_folder):
    with pytest.raises(
        AdapterFormatError, match=f"init_lora_weights .*{init}.*path_initial_model_for_weight_conversion"
    ):
        read_adapter(make_folder("x", init_lora_weights=init))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_plain_initialisations_are_read(init, make_folder):
    read_adapter(make_folder("x", init_lora_weights=init))


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "ADALORA", "VERA", "XLORA", "EVIL", None, 3, "lora", ["LORA"]])
def test_other_kinds_are_refused_by_name(kind, make_folder):
    with pytest.raises(AdapterFormatError, match="peft_type"):
        read_adapter(make_folder("x", peft_type=kind))


def test_weight_tying_of_an_adapted_embedding_is_refused(make_folder, tensors):
    read_adapter(make_folder("harmless", ensure_weight_tying=True))
    tensors["base_model.model.m.emb.lora_embedding_A"] = torch.ones(2, 9)
    tensors["base_model.model.m.emb.lora_embedding_B"] = torch.ones(6, 2)
    targets = ["q", "v", "emb"]
    assert read_adapter(make_folder("fine", tensors, target_modules=targets)).targets["m.emb"].kind == "embedding"
    with pytest.raises(AdapterFormatError, match="ensure_weight_tying"):
        read_adapter(make_folder("tied", tensors, target_modules=targets, ensure_weight_tying=True))


WRONG = {
    "r": [0, -1, 400_000, 2**31, 2.0, "8", True, None],
    "lora_alpha": ["8", True, 1e31, [1]],
    "rank_pattern": [{"q": 0}, {"q": "2"}, [1], "q"],
    "alpha_pattern": [{"q": "2"}, {"q": None}, [1]],
    "target_modules": [3, [3], [""], {"q": 1}],
    "modules_to_save": [3, [None]],
    "layers_to_transform": ["0", [-1], [0.5]],
    "use_rslora": [1, "true"],
    "base_model_name_or_path": [3, ["a"]],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_fields_of_wrong_type_or_range_are_refused_by_name(field, value, make_folder):
    with pytest.raises(AdapterFormatError, match=f"{field}.* must be .*got"):
        read_adapter(make_folder("x", **{field: value}))


def test_absurd_scalings_are_refused(make_folder):
    with pytest.raises(AdapterFormatError, match=r"scaling .* beyond the limit"):
        read_adapter(make_folder("x", lora_alpha=1e30))


def test_all_problems_of_a_configuration_come_at_once():
    with pytest.raises(AdapterFormatError) as caught:
        parse_config({"peft_type": "LORA", "use_dora": True, "r": -1, "bias": "all", "target_modules": 3})
    for field in ("use_dora", "r must", "bias 'all'", "target_modules must"):
        assert field in str(caught.value)


def test_harmless_unknown_fields_are_kept_and_noted(make_folder):
    from compose.formats.peft import inspect_adapter

    header = inspect_adapter(make_folder("x", author="someone", seed=3, empty={}))
    assert header.config["author"] == "someone"
    assert [note for note in header.notes if "author" in note]
    assert [note for note in header.notes if "seed" in note]
    assert not [note for note in header.notes if "empty" in note]


def test_the_configuration_file_is_bounded_and_regular(make_folder):
    folder = make_folder("x", padding="x" * 2**20)
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json: .* more than the limit of 1,048,576"):
        read_adapter(folder)
    path = folder / "adapter_config.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 900\n")
    with pytest.raises(AdapterFormatError, match=r"Git LFS pointer.*git lfs pull"):
        read_adapter(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json: not a regular file"):
        read_adapter(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
field_names = st.sampled_from(
    [*WRONG, *VARIANTS, "init_lora_weights", "layers_pattern", "exclude_modules", "task_type", "x"]
)


@given(st.dictionaries(field_names, json_values, max_size=4))
@settings(max_examples=400, deadline=None)
def test_any_configuration_is_read_or_refused(fields):
    try:
        config = parse_config({"peft_type": "LORA", **fields})
        assert math.isfinite(config.scaling("m.layers.0.q", config.rank))
    except AdapterFormatError:
        pass


@given(st.floats(-1e4, 1e4), st.integers(1, 65_536))
@settings(max_examples=500, deadline=None)
def test_the_written_alpha_gives_the_scaling_back_to_one_rounding(scaling, rank):
    again = exact_alpha(scaling, rank) / rank
    assert again == scaling or abs(again - scaling) <= math.ulp(scaling)


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16, 64])
def test_ranks_that_are_powers_of_two_give_the_scaling_back_exactly(rank):
    for scaling in (0.1, 1 / 3, 2.0, -0.7, 1e-8):
        assert exact_alpha(scaling, rank) / rank == scaling


NAMES = [f"m.layers.{number}.q" for number in range(20_000)]
LONG = {
    "target_modules": NAMES,
    "exclude_modules": [f"other{number}" for number in range(len(NAMES))],
    "layers_to_transform": list(range(len(NAMES))),
}


@pytest.mark.parametrize("field", LONG)
def test_lists_as_long_as_the_file_are_compared_in_linear_time(field):
    config = parse_config({"peft_type": "LORA", "target_modules": ["q"], field: LONG[field]})
    start = time.process_time()
    assert check_targets(config, NAMES) == []
    assert check_targets(config, [*NAMES, "m.layers.20000.v"]) != [] or field == "exclude_modules"
    assert time.process_time() - start < 5


def test_problems_of_long_lists_stay_short():
    config = parse_config({"peft_type": "LORA", "target_modules": ["q"], "layers_to_transform": list(range(1000))})
    problems = check_targets(config, [f"m.layers.{number}.q" for number in range(1000, 2000)])
    assert sum(map(len, problems)) < 500_000


@pytest.mark.parametrize(
    ("field", "entries"),
    [
        ("rank_pattern", {"a": 2, "b": 2}),
        ("alpha_pattern", {"a": 2, "b": 2}),
        ("layers_pattern", ["layers", "blocks"]),
        ("modules_to_save", ["head", "head"]),
    ],
)
def test_work_that_grows_with_two_lists_is_bounded(field, entries, make_folder, tensors, monkeypatch):
    content = {
        **tensors,
        "base_model.model.head.weight": torch.ones(2, 2),
        "base_model.model.head.bias": torch.ones(2),
    }
    saved = {"modules_to_save": ["head"], field: entries}
    pairs = 2 * (2 if field == "modules_to_save" else len(tensors) // 2)
    monkeypatch.setattr("compose.formats.peft_config.MAX_COMPARISONS", pairs)
    read_adapter(make_folder("x", content, **saved))
    monkeypatch.setattr("compose.formats.peft_config.MAX_COMPARISONS", pairs - 1)
    with pytest.raises(AdapterFormatError, match=f"{field} has 2 entries for"):
        read_adapter(make_folder("y", content, base_model_name_or_path="other", **saved))
