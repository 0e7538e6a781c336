from __future__ import annotations

import time

import pytest

from chat import CHATML_TOKENS, make_tokenizer, tokenizer_of
from tunegate.data.check import CheckReport
from tunegate.data.render import Renderer
from tunegate.data.template import CHATML
from tunegate.data.tokens import check_tokens, length_stats, render_all, show_rows
from tunegate.data.types import Example, Rendered
from tunegate.errors import InputError

RENDERER = Renderer(tokenizer_of("marked"), template="chatml")


def ask(line: int, question: str, answer: str) -> Example:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Example("rows.jsonl", line, messages=messages)


def tokens_of(example: Example) -> int:
    messages = list(example.messages)
    return len(RENDERER.tokenizer.apply_chat_template(messages, chat_template=CHATML)["input_ids"])


def found(report: CheckReport) -> dict[str, object]:
    return {finding.code: finding for finding in report.findings}


# --- render_all ----------------------------------------------------------------------------------------------------


def test_rows_come_in_order_and_whole():
    examples = [ask(i, f"question {i}", "red") for i in range(1, 1200)]  # more than two chunks
    rows = render_all(examples, RENDERER, max_tokens=100)
    assert [row.row_id for row in rows] == [e.row_id for e in examples]
    assert rows[700] == RENDERER.render(examples[700])


def test_long_rows_stop_the_run_in_one_problem():
    examples = [ask(i, "fox " * (i * 10), "red") for i in range(1, 10)]
    lengths = [tokens_of(e) for e in examples]
    limit = lengths[1]
    with pytest.raises(InputError) as error:
        render_all(examples, RENDERER, max_tokens=limit)
    (problem,) = error.value.problems
    assert problem.what == "too long: 7 of 9 rows"
    assert f"rows.jsonl:3 ({lengths[2]} tokens)" in problem.got and "and 2 more" in problem.got
    assert f"at most {limit} tokens" in problem.expected
    assert f"data.max_tokens: {max(lengths)}" in problem.fix and "data.on_long_row: truncate" in problem.fix


def test_truncated_rows_keep_their_answer_and_are_reported():
    examples = [ask(1, "fox " * 50, "red"), ask(2, "fox", "red")]
    report = CheckReport()
    rows = render_all(examples, RENDERER, max_tokens=20, on_long_row="truncate", report=report)
    assert [len(row) <= 20 for row in rows] == [True, True] and len(rows[0]) == 20
    whole = RENDERER.render(examples[0])
    assert isinstance(whole, Rendered)
    assert rows[0].n_targets == whole.n_targets and rows[0].ids == whole.ids[-20:]
    (finding,) = report.findings
    assert (finding.code, finding.count) == ("long_rows", 1) and f"{len(whole) - 20} tokens lost" in finding.message


def test_an_answer_that_does_not_fit_is_an_error_even_when_truncating():
    examples = [ask(1, "fox", "red " * 50)]
    with pytest.raises(InputError, match="the last answer alone is too long in 1 of 1 row"):
        render_all(examples, RENDERER, max_tokens=20, on_long_row="truncate")


def test_skipped_rows_are_counted():
    report = CheckReport()
    examples = [ask(1, "fox " * 50, "red"), ask(2, "fox", "red")]
    rows = render_all(examples, RENDERER, max_tokens=20, on_long_row="skip", report=report)
    assert [row.row_id for row in rows] == ["rows.jsonl:2"]
    assert report.findings[0].count == 1 and "skipped" in report.findings[0].message


def test_all_problems_at_once_and_equal_ones_together():
    base = Renderer(tokenizer_of("base"))
    examples = [ask(i, "q", "a") for i in range(1, 9)] + [
        Example("t.txt", 1, text="fox " * 50),
        Example("t.txt", 2, text=""),
    ]
    with pytest.raises(InputError) as error:
        render_all(examples, base, max_tokens=20)
    what = [problem.what for problem in error.value.problems]
    assert what == [
        "the tokenizer has no chat template",
        "no token to learn: empty answer",
        "too long: 1 of 10 rows",
    ]
    assert error.value.problems[0].where.endswith("rows.jsonl:5 and 3 more")
    assert error.value.problems[1].where == "t.txt:2"


# --- check_tokens --------------------------------------------------------------------------------------------------


def test_clean_rows_give_numbers_and_no_finding():
    splits = {"train": [ask(i, "fox " * i, "red") for i in range(1, 41)], "test": [ask(1, "a", "b")]}
    report = CheckReport()
    rows = check_tokens(splits, RENDERER, 2048, report)
    assert report.findings == [] and report.ok
    assert {name: len(split) for name, split in rows.items()} == {"train": 40, "test": 1}
    stats = report.stats["tokens"]
    lengths = sorted(tokens_of(e) for split in splits.values() for e in split)
    assert (stats["rows"], stats["total"], stats["max"]) == (41, sum(lengths), max(lengths))
    assert stats["median"] == lengths[20]
    assert stats["targets"] == sum(row.n_targets for split in rows.values() for row in split)
    assert sum(bucket["rows"] for bucket in stats["histogram"]) == 41
    assert stats["splits"]["test"]["rows"] == 1


def test_control_tokens_in_text_are_counted_by_row_and_token():
    examples = [ask(1, "<|im_end|> and <|im_end|>", "ok"), ask(2, "a", "<|im_start|>"), ask(3, "a", "b")]
    report = CheckReport()
    check_tokens({"train": examples}, RENDERER, 100, report)
    finding = found(report)["control_tokens"]
    assert finding.count == 2 and finding.level == "warning"
    assert "<|im_end|> 2x" in finding.message and "<|im_start|> 1x" in finding.message
    assert finding.examples == ["rows.jsonl:1 (<|im_end|>)", "rows.jsonl:2 (<|im_start|>)"]


@pytest.mark.parametrize(("on_long_row", "level"), [("error", "error"), ("truncate", "warning"), ("skip", "warning")])
def test_long_rows_tell_what_truncation_would_cut(on_long_row, level):
    history = [*ask(1, "fox", "red " * 10).messages, *ask(1, "fox", "blue").messages]
    examples = [Example("r", 1, messages=tuple(history)), ask(2, "fox", "red " * 40), ask(3, "fox", "red")]
    whole = RENDERER.render(examples[0])
    assert isinstance(whole, Rendered)
    limit = len(whole) - 12
    kept = RENDERER.truncate(whole, limit)
    report = CheckReport()
    rows = check_tokens({"train": examples}, RENDERER, limit, report, on_long_row)
    finding = found(report)["long_rows"]
    assert (finding.level, finding.count) == (level, 2)
    assert f"cut 12 tokens, {whole.n_targets - kept.n_targets} of them targets, from 1 row;" in finding.message
    assert "the last answer alone does not fit in 1 row" in finding.message
    assert [len(row) for row in rows["train"]] == [tokens_of(e) for e in examples]
    no_target = found(report).get("no_target")
    assert (no_target is not None) == (on_long_row == "truncate")
    assert no_target is None or (no_target.examples == ["rows.jsonl:2"] and "truncated" in no_target.message)


MARKED_NEVER = (
    "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
)
NO_ANSWER = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'user' or m.content == 'An answer' %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "answer", "cause"),
    [
        ("chatml", "", "empty answer"),
        ("chatml", "  ", None),
        (MARKED_NEVER, "red", "the template's {% generation %} markers enclose nothing of it"),
        (NO_ANSWER, "red", "the template leaves the answer out"),
    ],
)
def test_rows_without_a_target_and_why(template, answer, cause):
    tokenizer = make_tokenizer("gpt2", CHATML_TOKENS, None, bos=None, eos="<|im_end|>")
    report = CheckReport()
    check_tokens({"train": [ask(1, "q", answer)]}, Renderer(tokenizer, template=template), 100, report)
    if cause is None:
        assert report.findings == []
    else:
        (finding,) = report.findings
        assert (finding.code, finding.level, finding.count) == ("no_target", "error", 1)
        assert finding.message == f"no token to learn in 1 row: {cause}"


def test_answers_that_a_template_rewrites_are_reported():
    history = (*ask(1, "fox", "red").messages, *ask(1, "fox", "blue").messages)
    report = CheckReport()
    check_tokens({"train": [Example("r", 1, messages=history)]}, Renderer(tokenizer_of("qwen3")), 100, report)
    assert found(report)["unlearned_turns"].examples == ["r:1"]


def test_rows_that_cannot_be_rendered_are_one_finding():
    report = CheckReport()
    rows = check_tokens({"train": [ask(i, "q", "a") for i in range(9)]}, Renderer(tokenizer_of("base")), 100, report)
    (finding,) = report.findings
    assert (finding.level, finding.code, finding.count) == ("error", "render", 9)
    assert finding.message.startswith("9 rows: the tokenizer has no chat template")
    assert len(finding.examples) == 5 and rows == {"train": []} and report.stats["tokens"]["rows"] == 0


def test_a_hundred_thousand_tokens_are_quick():
    example = ask(1, "the lazy dog " * 30_000, "red")
    hostile = ask(2, "the <|im_end|> dog " * 10_000, "red")
    start = time.process_time()
    report = CheckReport()
    rows = check_tokens({"train": [example, hostile]}, RENDERER, 2048, report, "truncate")["train"]
    assert min(len(row) for row in rows) > 100_000
    assert time.process_time() - start < 10
    assert found(report)["control_tokens"].count == 1


# --- numbers -------------------------------------------------------------------------------------------------------


def test_length_stats_by_hand():
    rows = [Rendered(str(n), (0,) * n, (True,) * n) for n in (3, 16, 17, 40, 200)]
    assert length_stats(rows) == {
        "rows": 5,
        "total": 276,
        "targets": 271,  # a row's first token cannot be learned
        "median": 17,
        "p95": 200,
        "max": 200,
        "histogram": [
            {"upto": 16, "rows": 2},
            {"upto": 32, "rows": 1},
            {"upto": 64, "rows": 1},
            {"upto": 128, "rows": 0},
            {"upto": 256, "rows": 1},
        ],
    }
    assert length_stats([])["rows"] == 0
    assert length_stats(rows[:1] * 100)["p95"] == 3


# --- show ----------------------------------------------------------------------------------------------------------


def styles(text, part: str) -> str:
    start = text.plain.index(part)
    return " ".join(str(s.style) for s in text.spans if s.start <= start < s.end)


def test_shown_rows_mark_targets_borders_and_special_tokens():
    row = RENDERER.render(ask(7, "my order", "yes my"))
    assert isinstance(row, Rendered)
    (text,) = show_rows([row], RENDERER.tokenizer)
    lines = text.plain.split("\n")
    assert lines[0] == f"rows.jsonl:7  {len(row)} tokens, {row.n_targets} targets"
    assert lines[1] == "<|im_start|>│user│⏎│" and lines[-1] == ""
    assert "yes│ my│<|im_end|>│⏎│\n" in text.plain
    assert styles(text, "yes") == "bold green" and styles(text, "user") == "dim"
    assert styles(text, "<|im_start|>") == "dim reverse"
    assert text.plain.count("│") == len(row)


def test_shown_tokens_that_are_parts_of_a_character_stay_together():
    row = RENDERER.render(ask(1, "a", "b 🦊 c"))
    assert isinstance(row, Rendered)
    (text,) = show_rows([row], RENDERER.tokenizer)
    n = len(RENDERER.tokenizer("🦊")["input_ids"])
    assert f"🦊⟨{n}⟩│" in text.plain and "\ufffd" not in text.plain


def test_shown_spaces_of_sentencepiece():
    renderer = Renderer(tokenizer_of("llama2"))
    row = renderer.render(ask(1, "my order", "red green"))
    assert isinstance(row, Rendered)
    (text,) = show_rows([row], renderer.tokenizer)
    shown = text.plain.split("\n", 1)[1].replace("│", "").replace("\n", "")
    assert "red green" in shown and styles(text, "</s>") == "bold green reverse"


def test_a_very_long_row_is_shown_without_its_middle():
    row = RENDERER.render(ask(1, "the lazy dog " * 3000, "yes"))
    assert isinstance(row, Rendered)
    (text,) = show_rows([row], RENDERER.tokenizer)
    assert f"... {len(row) - 2000:,} tokens ..." in text.plain and "yes│<|im_end|>" in text.plain
    assert text.plain.count("│") == 2000
