"""The quality benchmark's own parts: its measures, its judgement, what it skips, what it lets programs do."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import quality_code
import quality_data
import quality_plan
import quality_sandbox
import quality_speech
import quality_stats
from quality_plan import Cell


@pytest.mark.parametrize(
    ("said", "heard", "percent"),
    [
        (["a b c d"], ["a b c d"], 0),
        (["a b c d"], ["a x c d"], 25),
        (["a b c d"], ["a c d"], 25),
        (["a b c d"], ["a b b c d"], 25),
        (["a b c d"], ["A b c d"], 25),
        (["a b", "c d"], ["", "d c"], 100),
        (["a"], ["b c d"], 300),
    ],
)
def test_word_error_rate(said, heard, percent):
    assert quality_speech.word_error_rate(said, heard) == percent


def test_bytes_of_tokens_are_those_of_the_text():
    tokenizer = tiny_tokenizer()
    text = "local s = 'naïve — λ'\n\treturn s\n"
    ids = torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    assert quality_code.count_bytes(ids, tokenizer) == len(text.encode())


def test_blocks_are_spread_over_all():
    assert quality_code.evenly(torch.arange(100).view(100, 1), 4).flatten().tolist() == [0, 33, 66, 99]
    with pytest.raises(AssertionError, match="2 blocks, 4 wanted"):
        quality_code.evenly(torch.zeros(2, 1), 4)


def cells(values: dict[str, list[float]], task: str = "code", metric: str = "bpb") -> list[dict]:
    """Rows of rank 1, seed 0: method -> value of each language."""
    return [
        {"task": task, "language": f"l{i}", "method": method, "rank": 1, "seed": 0, metric: value}
        for method, column in values.items()
        for i, value in enumerate(column)
    ]


def test_paired_differences_have_the_interval_of_student():
    rows = cells({"lora": [1.0, 2.0, 4.0, 8.0], "flora": [1.01, 2.04, 4.12, 8.32]})
    found = quality_stats.compare(rows, "code", "flora", "lora", "bpb")
    assert found is not None
    # 1, 2, 3 and 4 %: mean 2.5 %, standard deviation 1.29 %, t for three degrees of freedom 3.182.
    assert found["relative_difference"] == pytest.approx(0.025, abs=1e-5)
    assert found["standard_error"] == pytest.approx(0.00645, abs=1e-5)
    assert found["interval_95"] == pytest.approx([0.025 - 3.182 * 0.006455, 0.025 + 3.182 * 0.006455], abs=2e-5)
    assert found["verdict"].startswith("open")


def test_seeds_of_a_language_are_one_unit():
    rows = cells({"lora": [1.0, 2.0], "flora": [1.1, 2.0]})
    rows += [{**row, "seed": 1, "bpb": row["bpb"] + 0.2} for row in rows if row["language"] == "l0"]
    found = quality_stats.compare(rows, "code", "flora", "lora", "bpb")
    assert found is not None
    assert found["languages"] == 2
    assert found["relative_difference"] == pytest.approx((1.2 / 1.1 - 1) / 2, abs=1e-5)
    assert quality_stats.compare(rows[:1], "code", "flora", "lora", "bpb") is None


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(-0.02, -0.01, "better"), (-0.02, 0.009, "not worse"), (0.011, 0.02, "worse"), (0.0, 0.02, "open")],
)
def test_verdict_follows_the_margin(low, high, words):
    assert quality_stats.verdict(low, high, 0.01).split(":")[0] == words


def test_means_are_over_languages_that_every_method_has():
    rows = cells({"base": [1.0, 2.0, 9.0], "ia3": [1.0, 2.0], "lora": [1.0, 3.0], "flora": [2.0, 2.0]})
    served = [{"kind": "served", "task": "code", "served_equals_peft": worst} for worst in (1e-3, 1e-5)]
    _, result = quality_stats.summarise(rows, served, quick=True)
    assert (result["code_bpb_base"], result["code_bpb_lora"], result["code_bpb_languages"]) == (1.5, 2.0, 2)
    assert result["asr_wer_flora"] is None
    assert result["served_equals_peft"] == 1e-5


def test_a_cell_of_another_setup_is_not_done():
    cell = Cell("code", "lua", "flora")
    row = {"kind": "cell", **vars(cell), "setup": {"steps": 8}, "bpb": 1.0}
    assert quality_plan.find_row([row], "cell", cell, {"steps": 8}) is row
    assert quality_plan.find_row([row], "cell", cell, {"steps": 9}) is None
    assert quality_plan.find_row([row], "cell", cell, {"steps": 8}, rate=0.5) is None
    assert quality_plan.find_row([row], "cell", Cell("code", "lua", "flora", seed=1), {"steps": 8}) is None


def test_search_goes_on_while_the_best_rate_is_at_an_end():
    tried = []

    def loss(rate):
        tried.append(rate)
        return abs(rate - 0.25)

    assert quality_plan.search(loss, 4.0, (1.0, 0.5, 0.25), 2) == 0.25
    assert tried == [4.0, 2.0, 1.0, 0.5, 0.25, 0.125]
    assert quality_plan.search(loss, 4.0, (1.0, 0.5)) == 2.0


def test_plan_is_balanced_and_holds_every_cell_once():
    plan = quality_plan.full_plan()
    assert len(plan) == len(set(plan)) == 13 * 4 + 4 * 2 * 3 + 4
    assert [cell.method for cell in plan[:4]] == list(quality_plan.METHODS)
    assert {cell.language for cell in plan[:4]} == {"lua"}
    firsts = [cell for cell in plan if (cell.rank, cell.seed) == (1, 0)]
    assert plan[: len(firsts)] == firsts
    assert set(quality_plan.quick_plan()) <= set(firsts)


def test_no_text_is_in_two_splits():
    texts = [f"{i:03}" * 10 for i in range(20)]
    first, rest = quality_data._take(texts, 60)
    second, left = quality_data._take(rest, 60)
    assert (len(first), len(second)) == (2, 2)
    assert first + second + left == texts


perl = pytest.mark.skipif(quality_sandbox._find("perl") is None, reason="needs perl")


@perl
@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("exit 0;", True),
        ("exit 1;", False),
        ("die 'wrong';", False),
        ("this is no program", False),
        ("while (1) {}", False),
        ("my $x = 'a' x (8 * 1024 ** 3);", False),
        ("open(my $f, '>', 'big'); print $f 'a' x (128 * 1024 ** 2); close($f) or exit 1;", False),
        ("exit(scalar(glob('*')) eq 'main.pl' ? 0 : 1);", True),
        ("exit(exists $ENV{SECRET} ? 1 : 0);", True),
    ],
)
def test_programs_run_within_limits(program, passes, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setattr(quality_sandbox, "TIME_S", 2)
    assert quality_sandbox.run("perl", program) is passes


@pytest.mark.skipif(quality_sandbox._find("racket") is None, reason="needs racket")
@pytest.mark.parametrize(("value", "passes"), [("1", True), ("2", False)])
def test_a_failed_check_of_racket_is_a_failure(value, passes):
    """Its process ends with status 0 either way."""
    assert quality_sandbox.run("racket", f"#lang racket\n(require rackunit)\n(check-equal? 1 {value})\n") is passes


@perl
def test_programs_have_no_network_where_namespaces_are_allowed():
    if not quality_sandbox._without_network():
        pytest.skip("no network namespaces here")
    program = "open(my $f, '<', '/proc/net/dev'); my @lines = <$f>; exit(scalar(@lines) == 3 ? 0 : 1);"
    assert quality_sandbox.run("perl", program)


def test_a_language_without_its_interpreter_says_so(monkeypatch):
    monkeypatch.setattr(quality_sandbox, "_find", lambda tool: None)
    assert quality_sandbox.missing("ruby") == "ruby is not installed"
