"""Every fault that testers and fuzzers found, by its number, and the tests that hold it mended.

A: memory. B: small files that cost much or lie. C: files, terminals, signals. D: what misleads.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.faults import tested

ROOT = Path(__file__).parents[2]
COUNTS = {"A": 7, "B": 10, "C": 7, "D": 9}
ROWS, API, FORMAT = "parity/test_rows.py", "fuzz/test_api.py", "format/test_folder.py"
CALLBACKS, CACHES = "parity/test_callbacks.py", "parity/test_caches.py"
TEAM, TRUST, CHECKPOINT = (
    "parity/test_engine_threads.py", "kernels/test_trusted.py", "train/test_checkpoint.py",
)  # fmt: skip
TEXT, VERBS, STREAMS = "text/test_tokenizer.py", "cli/test_every_verb.py", "faults/test_streams.py"
RUN, OPTIONS = "train/test_run_folder.py", "cli/test_generation_options.py"
COVERED: dict[str, tuple[str, list[str]]] = {
    "A1": ("checks outside the lock", [
        f"{ROWS}::test_two_threads_step_one_cache_to_its_end",
        f"{ROWS}::test_a_check_before_the_turn_is_seen",
        f"{CALLBACKS}::test_a_callback_that_calls_the_engine_is_refused",
        "faults/test_soak.py::test_threads_copies_and_forks",
    ]),
    "A2": ("looks of a rule", [
        f"{ROWS}::test_a_rule_is_checked_in_step",
        f"{API}::test_both_engines_refuse_and_give_the_same",
    ]),
    "A3": ("logits that are not finite", [
        "parity/test_not_finite.py::test_refused",
        "parity/test_not_finite.py::test_a_greedy_draft_is_unsure",
    ]),
    "A4": ("copied caches", [
        f"{CACHES}::test_a_copy_goes_on_alone", f"{CACHES}::test_kept_addresses_are_seen",
    ]),
    "A5": ("checkpoints", [
        f"{CHECKPOINT}::test_damaged_checkpoints",
        f"{CHECKPOINT}::test_an_optimizer_that_is_not_this_models",
        "fuzz/test_fuzz.py::test_damaged_files_are_used_or_refused",
    ]),
    "A6": ("a cache that others can write", [
        f"{TRUST}::test_a6_a_folder_that_others_can_write_is_not_used",
        f"{TRUST}::test_a6_another_users_file_is_not_read",
        f"{TRUST}::test_a6_only_regular_files_are_read_and_nothing_hangs",
        f"{TRUST}::test_a6_the_reason_is_said",
    ]),
    "A7": ("fork", [f"{TEAM}::test_a_fork_while_another_thread_is_in_the_engine"]),
    "B1": ("small files that claim much", [
        f"{FORMAT}::test_faults_are_refused", f"{CHECKPOINT}::test_small_files_that_claim_much",
        f"{CHECKPOINT}::test_archives_that_unfold",
    ]),
    "B2": ("stored truncation, padding, dropout", [
        f"{TEXT}::test_stored_settings_are_off_and_not_passed_on",
    ]),
    "B3": ("streams of byte fallback", [
        "text/test_streaming.py::test_pieces_join_to_the_library_s_text",
    ]),
    "B4": ("tokenizers that panic or hang", [
        f"{TEXT}::test_a_panic_of_the_library_is_one_line",
        f"{TEXT}::test_a_tokenizer_without_its_unknown_token_says_so",
        f"{TEXT}::test_a_folder_whose_name_is_not_utf8",
        f"{TEXT}::test_expressions_that_take_for_ever_are_refused",
    ]),
    "B5": ("special tokens in a text", [
        f"{TEXT}::test_special_tokens_in_a_text_are_text_unless_asked",
    ]),
    "B6": ("line ends, BOM, bad bytes", [
        "text/test_documents.py::test_a_text_as_every_reader_has_it",
        "text/test_documents.py::test_a_bad_byte_is_where_it_is",
    ]),
    "B7": ("numbers of the wrong kind", [
        f"{FORMAT}::test_faults_are_refused", f"{OPTIONS}::test_a_wrong_value_is_one_line",
        f"{ROWS}::test_odd_arguments",
    ]),
    "B8": ("ranges in one precision", [f"{OPTIONS}::test_a_wrong_value_is_one_line"]),
    "B9": ("a damaged token cache", ["train/test_data.py::test_a_damaged_cache_is_made_anew"]),
    "B10": ("ids that ONNX takes", [
        "parity/test_onnx.py::test_a_graph_refuses_ids_that_the_engine_refuses",
    ]),
    "C1": ("what is written over", [
        f"{FORMAT}::test_a_written_file_keeps_mode_links_and_what_is_no_file",
        "format/test_files.py::test_a_folder_takes_the_place_of_another",
        "faults/test_faults.py::test_nothing_is_lost",
    ]),
    "C2": ("a full disk, no home", [
        f"{TRUST}::test_c2_a_full_disk_costs_one_run_its_cache",
        f"{TRUST}::test_c2_a_user_without_a_home_gets_help",
        "faults/test_faults.py::test_nothing_is_lost",
    ]),
    "C3": ("two trainings, SIGTERM, another run resumed", [
        f"{RUN}::test_two_trainings_in_one_folder", f"{RUN}::test_sigterm_saves",
        f"{RUN}::test_another_run_is_not_resumed",
        "train/test_killed.py::test_killed_and_resumed",
    ]),
    "C4": ("control characters", [
        "cli/test_terminal.py::test_text_on_a_terminal_is_harmless",
        "cli/test_terminal.py::test_colours_where_they_are_wanted",
    ]),
    "C5": ("streams that are closed or full", [
        f"{STREAMS}::test_c5_closed_streams_change_nothing",
        f"{STREAMS}::test_c5_a_full_disk_behind_standard_output",
        f"{STREAMS}::test_c5_nobody_reads", f"{STREAMS}::test_c5_a_prompt_from_a_closed_stream",
    ]),
    "C6": ("threads that cannot start", [f"{TEAM}::test_threads_that_cannot_start"]),
    "C7": ("one policy of errors", [
        f"{VERBS}::test_what_is_no_model_is_one_line", f"{VERBS}::test_what_is_no_text_is_one_line",
        f"{VERBS}::test_a_missing_extra_says_what_to_install",
    ]),
    "D1": ("budgets, and what exporting again keeps", [
        "cli/test_calibrate.py::test_a_budget_in_percent",
        "cli/test_calibrate.py::test_what_could_be_above_the_budget_is_not_chosen",
        "export/test_pack.py::test_d1_exporting_again_keeps_what_the_folder_says",
    ]),
    "D2": ("colours of depth", ["cli/test_showing.py::test_one_scale_of_depth"]),
    "D3": ("verify's end, contexts, advice", [
        "export/test_cli.py::test_a_missing_engine_is_a_failure",
        "export/test_pack.py::test_d3_the_folder_knows_the_context_of_training",
        f"{VERBS}::test_a_checkpoint_for_a_model_says_export",
    ]),
    "D4": ("words taken for something else", [
        f"{VERBS}::test_what_is_no_model_is_one_line",
        "cli/test_generate.py::test_the_prompt_comes_from_a_file_or_standard_input",
        f"{STREAMS}::test_d4_every_package_with_verbs_is_a_program",
    ]),
    "D5": ("late refusals", [
        "cli/test_exits.py::test_without_matplotlib_one_line_says_what_to_install",
    ]),
    "D6": ("bits with and without padding", [
        "cli/test_inspect.py::test_d6_bits_with_and_without_padding",
    ]),
    "D7": ("settings of a training", [
        f"{RUN}::test_settings_can_be_used_again", f"{RUN}::test_a_checkpoint_is_inspected",
        f"{RUN}::test_threads_are_measured",
        "test_documents.py::test_the_settings_tables_are_up_to_date",
    ]),
    "D8": ("what dynamic exits cost", [
        "faults/test_numbers.py::test_d8_the_readme_says_what_a_dynamic_exit_costs",
    ]),
    "D9": ("sentences that nobody understands", [
        "faults/test_numbers.py::test_d9_sentences_that_took_three_readings_are_gone",
    ]),
}  # fmt: skip


@functools.cache
def names_of(path: Path) -> set[str | None]:
    """What a file of tests defines."""
    tree = ast.parse(path.read_text("utf-8")) if path.is_file() else ast.parse("")
    return {getattr(node, "name", None) for node in tree.body}


def missing(covered: dict[str, tuple[str, list[str]]]) -> list[str]:
    """Numbers without a test, and tests that are not there."""
    numbers = {f"{letter}{i}" for letter, n in COUNTS.items() for i in range(1, n + 1)}
    wrong = sorted(numbers ^ covered.keys())
    for number, (_, tests) in covered.items():
        wrong += [] if tests else [f"{number}: none"]
        for test in tests:
            file, _, name = test.partition("::")
            if name not in names_of(ROOT / "tests" / file):
                wrong.append(f"{number}: {test}")
    return wrong


def test_every_number_has_its_tests() -> None:
    assert missing(COVERED) == []


@pytest.mark.parametrize(
    ("number", "tests"),
    [("C5", None), ("E1", ["test_house.py::test_x"]), ("A1", []), ("A1", ["no.py::test"]),
     ("A1", [f"{ROWS}::test_that_was_renamed"])],
)  # fmt: skip
def test_a_planted_gap_is_seen(number: str, tests: list[str] | None) -> None:
    changed = {n: c for n, c in COVERED.items() if n != number}
    assert missing(changed | ({} if tests is None else {number: ("", tests)}))


def test_d8_the_readme_says_what_a_dynamic_exit_costs() -> None:
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert "a gate's look costs half a block" in readme and "exit 18 is best" in readme


def test_the_table_of_long_runs_is_up_to_date() -> None:
    assert tested.DOCUMENT.read_text("utf-8") == tested.rendered()


SENTENCES = [
    "two are one that accumulates twice", "the slower the memory just then",
    "its rounds imposed on", "In a tokenizer by merges first ids are about the commonest",
]  # fmt: skip


def test_d9_sentences_that_took_three_readings_are_gone() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"\s+", " ", path.read_text("utf-8"))
        assert not [s for s in SENTENCES if s in text], path
