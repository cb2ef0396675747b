import itertools
import subprocess
import sys

import pytest

from compose.demo.bank_data import adapter_rows
from compose.demo.contents import CONTENTS, split_of
from compose.demo.operations import HELD_OUT_SETS, OPERATIONS, is_held_out, run_program
from compose.demo.pretraining_data import END_BYTE, NO_CODE, pretraining_rows
from compose.demo.tasks import TASKS, shots, test_items

NAMES = sorted(TASKS)
OPERATION_NAMES = list(OPERATIONS)


@pytest.mark.parametrize("name", NAMES)
def test_sampling_is_a_function_of_name_and_seed(name):
    task = TASKS[name]
    assert task.sample(3, 20) == task.sample(3, 20)
    assert task.sample(3, 20) != task.sample(4, 20)


@pytest.mark.parametrize("name", NAMES)
def test_two_hundred_test_items_share_no_input_with_shots_or_training(name):
    task = TASKS[name]
    test = {item.input for item in test_items(task, 200)}
    assert len(test) == 200
    shown = {item.input for draw in range(3) for item in shots(task, 20, draw)}
    trained = {item.input for item in task.sample(0, 150, "train")}
    assert not test & shown
    assert not (test | shown) & trained


def test_fewer_shots_are_a_prefix_of_more():
    task = TASKS["new_wording_capitals"]
    assert shots(task, 5, 1) == shots(task, 20, 1)[:5]
    assert shots(task, 5, 1) != shots(task, 5, 2)


def test_groups_are_large_enough():
    sizes = {
        group: sum(task.group == group for task in TASKS.values()) for group in ("wording", "composition", "mixture")
    }
    assert min(sizes.values()) >= 6
    assert sum(task.group == "upstream" for task in TASKS.values()) >= 24


ANSWERS = [
    (("sum",), "12 + 30 + 8", "50"),
    (("next_number",), "40 42 44 46", "48"),
    (("next_number",), "28 24 20", "16"),
    (("add_days",), "27 February + 3", "2 March"),
    (("add_days",), "30 December + 2", "1 January"),
    (("add_weekdays",), "Monday + 3 - 5", "Saturday"),
    (("truth",), "false or true and not true", "false"),
    (("truth",), "not false and not false", "true"),
    (("returns_home",), "N E S W", "yes"),
    (("returns_home",), "N E S E", "no"),
    (("close_brackets",), "( [ ] {", "} )"),
    (("add_minutes",), "23:50 + 16", "00:06"),
    (("last_item",), "amber stone lake", "lake"),
    (("drop_first",), "amber stone lake", "stone lake"),
    (("longest",), "oar cabin lake", "cabin"),
    (("largest",), "9 71 28", "71"),
    (("reverse_order",), "amber stone lake", "lake stone amber"),
    (("sort_words",), "stone amber lake", "amber lake stone"),
    (("sort_numbers",), "9 71 28", "9 28 71"),
    (("rotate",), "amber stone lake", "stone lake amber"),
    (("reverse_letters",), "amber lake", "rebma ekal"),
    (("pig_latin",), "amber lake", "mberaay akelay"),
    (("drop_vowels",), "amber lake", "ambr lk"),
    (("initials",), "amber lake", "a l"),
    (("shift_letters",), "lazy", "mbaz"),
    (("word_lengths",), "oar cabin", "3 5"),
    (("swap_ends",), "amber lake", "rmbea eakl"),
    (("add_one",), "9 71", "10 72"),
    (("parity",), "9 72", "odd even"),
    (("spell_digits",), "9 71", "nine seven one"),
    (("capitals",), "amber lake", "AMBER LAKE"),
    (("title_case",), "amber lake", "Amber Lake"),
    (("dashes",), "amber lake", "amber-lake"),
    (("commas",), "amber lake", "amber, lake"),
    (("no_spaces",), "amber lake", "amberlake"),
    (("slashes",), "amber lake", "amber/lake"),
    (("round_brackets",), "amber lake", "(amber lake)"),
    (("quotes",), "amber lake", '"amber lake"'),
    (("shout",), "amber lake", "amber lake!"),
    (("stars",), "amber lake", "*amber lake*"),
    (("initials", "no_spaces"), "amber lake", "al"),
    (("longest", "reverse_letters"), "oar cabin", "nibac"),
    (("largest", "spell_digits"), "9 71", "seven one"),
    (("sum", "stars"), "12 + 30", "*42*"),
    (("dashes", "capitals", "reverse_order"), "amber stone lake", "LAKE-STONE-AMBER"),
]


@pytest.mark.parametrize(("program", "content", "answer"), ANSWERS)
def test_answers_worked_out_by_hand(program, content, answer):
    assert run_program(program, content) == answer


def test_every_operation_has_an_answer_worked_out_by_hand():
    assert set(OPERATIONS) == {program[0] for program, _, _ in ANSWERS if len(program) == 1}


@pytest.mark.parametrize("name", [name for name in NAMES if TASKS[name].group == "composition"])
def test_no_single_skill_answers_a_composition(name):
    task = TASKS[name]
    for item in test_items(task, 40):
        content = item.input.split(": ", 1)[1]
        assert item.output == run_program(task.skills, content)
        for skill in task.skills:
            assert item.output != run_program((skill,), content)


def test_two_operations_of_one_slot_are_refused():
    with pytest.raises(ValueError, match="share a slot"):
        run_program(("dashes", "commas"), "amber lake")


def test_pretraining_never_combines_what_a_composition_combines():
    rows = pretraining_rows(7, 3000)
    for codes in rows.codes:
        names = [OPERATION_NAMES[code] for code in codes if code != NO_CODE]
        assert not any(len(set(names) & set(held)) > 1 for held in HELD_OUT_SETS)
    assert is_held_out(("capitals", "reverse_order"))
    assert not is_held_out(("capitals", "rotate"))


@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_an_adapter_is_trained_on_no_shot_or_test_item(name):
    trained = {bytes(row).split(bytes([END_BYTE]))[0].decode() for row in adapter_rows(name, 0, 150)}
    prompts = {line.split("\n")[0] for line in trained}
    related = [task for task in TASKS.values() if name in task.skills]
    held = {item.input for task in related for item in (*test_items(task, 200), *shots(task, 20, 0))}
    assert not prompts & held


def test_the_three_splits_do_not_overlap_in_content():
    for kind, task_name in (("words", "capitals"), ("numbers", "largest")):
        assert kind in CONTENTS
        for split in ("train", "shots", "test"):
            for item in itertools.islice(TASKS[task_name].sample(1, 20, split), 20):
                content = item.input.split(": ", 1)[1] if ": " in item.input else item.input.split(" | ")[0]
                assert split_of(content) == split


def test_tasks_need_no_torch():
    code = "import sys; import compose.demo.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
