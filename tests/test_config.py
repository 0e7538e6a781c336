from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tunegate import config as config_module
from tunegate import yaml_file
from tunegate.config import STAND_IN, Config, FaultyTask, Task, default_lr, freeze, load_config
from tunegate.config_problems import _ELSEWHERE
from tunegate.errors import InputError, Problem

MINIMAL = "base: tiny\ndata: rows.jsonl\ntask: exact_match\n"


def load(folder: Path, text: str | bytes, *overrides: str, name: str = "task.yaml") -> Config:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


def problems(folder: Path, text: str | bytes, *overrides: str) -> list[Problem]:
    with pytest.raises(InputError) as error:
        load(folder, text, *overrides)
    assert error.value.exit_code == 2
    return error.value.problems


# --- what a good file becomes -----------------------------------------------------------------------------------------


def test_shorthand_equals_the_long_form(tmp_path: Path) -> None:
    short = load(tmp_path, MINIMAL)
    long = load(tmp_path, "base: {name: tiny}\ndata: {train: [rows.jsonl]}\ntask: {metric: exact_match}\n")
    assert short.task == long.task
    assert short.task.data.train == ("rows.jsonl",)
    assert load(tmp_path, MINIMAL.replace("rows.jsonl", "[a.jsonl, b.csv]")).task.data.train == ("a.jsonl", "b.csv")


def test_origins(tmp_path: Path) -> None:
    text = MINIMAL + "train:\n  rank: 16\n  rank_pattern: {q_proj: 4}\n"
    config = load(tmp_path, text, "train.seed=3", "gate.min_score=0.5", name="my task.yaml")
    found = {key: (value, origin) for key, value, origin in config.items()}
    assert found["train.rank"] == (16, "my task.yaml:5")
    assert found["train.alpha"] == (32.0, "default 2*rank")
    assert found["train.rank_pattern"] == ({"q_proj": 4}, "my task.yaml:6")
    assert found["train.seed"] == (3, "--set")
    assert found["gate.min_score"] == (0.5, "--set")
    assert found["train.epochs"] == (3.0, "default")
    assert found["base.name"] == ("tiny", "my task.yaml:1")
    assert found["name"] == ("my-task", "default: the file's name")
    assert [key for key in found if "." not in key] == ["name", "output", "registry"]


def test_a_given_alpha_keeps_its_origin(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL + "train: {alpha: 8}\n")
    assert (config.alpha, config.origins["train.alpha"]) == (8.0, "task.yaml:4")


def test_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load(tmp_path, MINIMAL)
    assert config.path("rows.jsonl") == tmp_path / "rows.jsonl"
    assert config.run_dir == tmp_path / "runs" / "task"
    assert load(tmp_path, MINIMAL + "output: ~/out\n").run_dir == tmp_path / "home" / "out"
    assert load(tmp_path, MINIMAL + "output: /abs/out\n").run_dir == Path("/abs/out")
    with pytest.raises(InputError, match="home folder"):
        config.path("~no-such-user-here/x")


def test_settle_returns_a_copy_with_the_reason(tmp_path: Path) -> None:
    before = load(tmp_path, MINIMAL)
    after = before.settle("train.lr", 1e-3, "default for 135M parameters")
    assert (before.task.train.lr, before.origins["train.lr"]) == (None, "default")
    assert (after.task.train.lr, after.origins["train.lr"]) == (1e-3, "default for 135M parameters")
    assert before.section_hash("train") != after.section_hash("train")
    assert before.section_hash("base", "data", "task", "gate") == after.section_hash("base", "data", "task", "gate")


def test_hash_follows_values_not_form(tmp_path: Path) -> None:
    one = load(tmp_path, MINIMAL + "train: {epochs: 2, rank: 8}\n")
    two = load(tmp_path, "# same\n" + MINIMAL + "train:\n  rank: 0x8\n  epochs: 2.0\n")
    assert one.section_hash("train") == two.section_hash("train")
    assert one.section_hash("train") != load(tmp_path, MINIMAL + "train: {rank: 9}\n").section_hash("train")


@pytest.mark.parametrize(
    ("parameters", "lr"), [(135e6, 1e-3), (0.5e9, 6.1e-4), (8e9, 2e-4), (33e9, 1.1e-4), (70e9, 1e-4)]
)
def test_default_lr(parameters: float, lr: float) -> None:
    assert default_lr(int(parameters))[0] == lr
    assert f"{parameters / 1e6:,.0f}M" in default_lr(int(parameters))[1]


def test_an_empty_section_is_its_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "train:\n  # rank: 8\ngate:\n").task == load(tmp_path, MINIMAL).task


def test_settings_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, MINIMAL).task.train.rank = 3  # type: ignore[misc]


# --- scalars ----------------------------------------------------------------------------------------------------------


def test_yaml_1_2_scalars() -> None:
    # Left: what YAML 1.1 would read as True, 8, 90, a date, a merge of 1000, a syntax error, and the text "1e-3".
    text = "[yes, no, on, off, y, 010, 1:30, 2024-01-01, 1_000, =, 1e-3, 0x1F, 0o17, -.inf, .5, +3, ~, true, '7']"
    value = yaml_file.parse(text, "", "").value
    expected = ["yes", "no", "on", "off", "y", 10, "1:30", "2024-01-01", "1_000", "=", 1e-3]
    assert value == [*expected, 31, 15, -math.inf, 0.5, 3, None, True, "7"]
    assert [type(v) for v in value[:11]] == [type(v) for v in expected]
    assert math.isnan(yaml_file.parse(".nan", "", "").value)


def test_labels_named_yes_and_no(tmp_path: Path) -> None:
    config = load(tmp_path, "base: b\ndata: d\ntask: {metric: accuracy, labels: [yes, no]}\ntrain: {lr: 1e-3}\n")
    assert config.task.task.labels == ("yes", "no")
    assert config.task.train.lr == 0.001


def test_merge_keys_and_aliases(tmp_path: Path) -> None:
    text = MINIMAL + "train: &t\n  rank: 4\ngate: {min_score: 0.1}\n"
    assert load(tmp_path, text + "name: &n x\noutput: *n\n").task.output == "x"
    merged = load(tmp_path, "<<: {base: tiny, task: exact_match}\ndata: rows.jsonl\n")
    assert merged.task == load(tmp_path, MINIMAL).task
    assert merged.origins["base.name"] == "task.yaml:1"


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_unknown_keys_name_the_nearest_and_the_line(tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL + "train:\n  rank: 8\n  learning_rat: 1e-3\n  alhpa: 3\ngat: {}\n")
    by_key = {p.what: p for p in found}
    assert by_key["unknown key 'train.alhpa'"].where == "task.yaml:7"
    assert "'alpha'" in by_key["unknown key 'train.alhpa'"].fix
    assert by_key["unknown key 'gat'"].where == "task.yaml:8"
    assert "'gate'" in by_key["unknown key 'gat'"].fix
    assert by_key["unknown key 'train.learning_rat'"].where == "task.yaml:6"
    assert len(found) == 3


def test_all_problems_come_together(tmp_path: Path) -> None:
    text = "data: rows.jsonl\ndata: other.jsonl\ntask: {metric: 3}\ntrain: {rank: 0, epochs: -1, xyzzy: 1}\n"
    found = problems(tmp_path, text, "train.seed=x", "gate.nothing=1", "oops")
    text = "\n".join(str(p) for p in found)
    for part in (
        "task.yaml:2: key 'data' stands twice",
        "the first is in line 1",
        "required key 'base' is missing",
        "task.yaml:3: task.metric: wrong value",
        'put it in quotes: "3"',
        "task.yaml:4: train.rank: wrong value",
        "greater than or equal to 1",
        "train.epochs: wrong value",
        "unknown key 'train.xyzzy'",
        "known keys: method, rank",
        "--set train.seed: train.seed: wrong value",
        "--set gate.nothing: unknown key 'gate.nothing'",
        "--set oops: an override is KEY=VALUE",
    ):
        assert part in text
    assert len(found) == 9


@pytest.mark.parametrize(
    ("line", "key", "expected"),
    [
        ("train: {rank: '8'}", "train.rank", "a whole number"),
        ("train: {rank: true}", "train.rank", "a whole number"),
        ("train: {rank: 8.5}", "train.rank", "a whole number"),
        ("train: {lr: fast}", "train.lr", "a number"),
        ("train: {lr: .nan}", "train.lr", "a finite number"),
        ("train: {lr: 1e999}", "train.lr", "a finite number"),
        ("train: {lr: 0}", "train.lr", "greater than 0"),
        ("train: {share_prefix: 'no'}", "train.share_prefix", "true or false"),
        ("train: {share_prefix: 0}", "train.share_prefix", "true or false"),
        ("train: {method: dorra}", "train.method", "'lora', 'rslora' or 'dora'"),
        ("train: {eval_every: 0}", "train.eval_every", "'epoch' or greater than or equal to 1"),
        ("train: {eval_every: sometimes}", "train.eval_every", "'epoch' or a whole number"),
        ("train: {rank_pattern: {q_proj: 0}}", "train.rank_pattern.q_proj", "greater than or equal to 1"),
        ("train: {rank_pattern: [q_proj]}", "train.rank_pattern", "a mapping of keys"),
        ("train: {layers: [0, -1]}", "train.layers.1", "greater than or equal to 0"),
        ("train: [rank]", "train", "a mapping of keys"),
        ("gate: {min_score: .inf}", "gate.min_score", "a finite number"),
        ("gate: {confidence: 1.0}", "gate.confidence", "less than 1"),
        ("name: ../up", "name", "String should match pattern"),
        ("name: a/b", "name", "String should match pattern"),
        ("output: 7", "output", "text"),
    ],
)
def test_wrong_values(tmp_path: Path, line: str, key: str, expected: str) -> None:
    (problem,) = problems(tmp_path, MINIMAL + line + "\n")
    assert problem.what == f"{key}: wrong value"
    assert problem.where == "task.yaml:4"
    assert problem.expected.startswith(expected)
    assert problem.got


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("base: b\ndata: {train: t, valid_fraction: 0.5, test_fraction: 0.5}\ntask: m", "data", "leaves too little"),
        ("base: b\ndata: {train: []}\ntask: m", "data.train", "needs at least one file"),
        ("base: b\ndata: {train: t, test: []}\ntask: m", "data.test", "needs at least one file"),
        (
            "base: b\ndata: d\ntask: {metric: m, labels: [a, b, a]}",
            "task.labels",
            "at least two distinct labels (twice: 'a')",
        ),
        ("base: b\ndata: d\ntask: {metric: m, labels: []}", "task.labels", "at least two distinct labels"),
        ("base: b\ndata: d\ntask: {metric: m, labels: [0, b]}", "task.labels.0", "text"),
        ("base: b\ndata: d\ntask: {metric: m, prompts: [{name: x, shots: 99}]}", "task.prompts.0.shots", "less than"),
        ("base: 7\ndata: d\ntask: m", "base", "a mapping of keys"),
    ],
)
def test_wrong_sections(tmp_path: Path, text: str, key: str, expected: str) -> None:
    found = {p.what: p for p in problems(tmp_path, text)}
    assert expected in found[f"{key}: wrong value"].expected


def test_fractions_may_sum_to_all_where_files_are_given(tmp_path: Path) -> None:
    text = "base: b\ndata: {train: t, valid: v, valid_fraction: 0.6, test_fraction: 0.6}\ntask: m"
    assert load(tmp_path, text).task.data.valid == ("v",)


def test_near_choice_is_named(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, MINIMAL + "train: {method: dorra}\n")
    assert "'dora'" in problem.fix


def test_long_values_are_cut(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, MINIMAL + f"train: {{rank: {'x' * 10_000}}}\n")
    assert len(problem.got) == 120


def test_keys_that_are_not_text(tmp_path: Path) -> None:
    for key in ("1", "1.5", "true", "~"):
        found = problems(tmp_path, MINIMAL + f"{key}: x\n")
        assert len(found) == 1
    (problem,) = problems(tmp_path, MINIMAL + "[a, b]: x\n")
    assert "unhashable" in problem.what


def faulty(folder: Path, text: str) -> FaultyTask:
    with pytest.raises(FaultyTask) as error:
        load(folder, text)
    return error.value


def test_problems_stand_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "\n" * 90 + MINIMAL + "train:\n  rnk: 1\n  epochs: -1\n  alpah: 2\ngate: {min_score: x}\n"
    found = problems(tmp_path, text, "train.seed=x")
    assert [p.where for p in found] == [*(f"task.yaml:{n}" for n in (95, 96, 97, 98)), "--set train.seed"]


def test_what_is_left_of_a_faulty_task(tmp_path: Path) -> None:
    """Only the faulty keys and entries of lists go; a required section that cannot do without them is a stand-in."""
    rules = "gate:\n  min_scroe: 1\n  confidence: 0.9\n  rules: [task >= 0.5, task >=, 'nonsense', task.items >= 3]\n"
    error = faulty(tmp_path, MINIMAL + "trian: {}\ntrain: {rank: 4, epochs: -1, rnk: 3}\n" + rules)
    assert error.sections == {"trian", "train", "gate"}
    left = error.rest.task
    assert (left.train.rank, left.train.epochs, left.gate.confidence) == (4, 3.0, 0.9)
    assert [rule.rule for rule in left.gate.rules] == ["task >= 0.5", "task.items >= 3"]
    assert left.task.metric == "exact_match" and left.data.train == ("rows.jsonl",)

    error = faulty(tmp_path, "data: {valid: v.jsonl}\ntask: {metric: 3, report: chrf}\njudge: {model: m}\n5: x\n")
    assert error.sections >= {"base", "data", "task", "judge"}
    assert error.rest.task.base.name == STAND_IN and error.rest.task.data.train == (STAND_IN,)
    assert error.rest.task.judge is None


def test_lists_that_an_alias_shares_are_cut_apart(tmp_path: Path) -> None:
    error = faulty(tmp_path, "base: b\ntask: m\ndata: {train: &a [1, a.jsonl], valid: *a, test: *a}\n")
    assert error.rest.task.data.train == error.rest.task.data.test == ("a.jsonl",)


@pytest.mark.parametrize("text", ["base: 7\ndata: 8\ntask: 9\ntrain: 5\ngate: {rules: task >}\n", "a: b\n"])
def test_something_is_left_of_any_mapping(tmp_path: Path, text: str) -> None:
    assert faulty(tmp_path, text).rest.task.base.name == STAND_IN


def test_names_of_other_tools_lead_to_ours(tmp_path: Path) -> None:
    found = {p.what: p.fix for p in problems(tmp_path, MINIMAL + "train: {learning_rate: 1e-4, r: 8}\ndatasets: x\n")}
    assert found["unknown key 'train.learning_rate'"] == "here it is `train.lr`"
    assert found["unknown key 'train.r'"] == "here it is `train.rank`"
    assert found["unknown key 'datasets'"] == "here it is `data`"
    for theirs, ours in _ELSEWHERE.items():
        section, _, key = ours.partition(":")[0].partition(".")
        field = Task.model_fields[section]
        assert not key or key in field.annotation.model_fields, ours  # type: ignore[union-attr]
        assert theirs not in Task.model_fields and theirs not in Task.model_fields["train"].annotation.model_fields  # type: ignore[union-attr]


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL,
        "base=other",
        "data=[a.jsonl, b.jsonl]",
        "task={metric: accuracy, labels: [yes, no]}",
        "train={rank: 2}",
        "train.rank_pattern.q_proj=5",
        "gate.min_score=",
        "name=x",
    )
    assert config.task.base.name == "other"
    assert config.task.data.train == ("a.jsonl", "b.jsonl")
    assert config.task.task.labels == ("yes", "no")
    assert (config.task.train.rank, config.task.train.rank_pattern, config.alpha) == (2, {"q_proj": 5}, 4.0)
    assert config.task.gate.min_score is None
    for key in ("base.name", "data.train", "task.labels", "train.rank", "train.rank_pattern", "gate.min_score", "name"):
        assert config.origins[key] == "--set"


def test_an_override_never_hides_a_broken_section(tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL + "train: 5\n", "train.rank=8")
    assert any("'train' is not a mapping" in p.what for p in found)
    assert any(p.what == "train: wrong value" for p in found)


@pytest.mark.parametrize("override", ["", "=1", "x", "train.rank=[1", "train.rank={a: 1, a: 2}", "..=1", "train.=1"])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    assert all(p.where.startswith("--set") for p in problems(tmp_path, MINIMAL, override))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf\n  \n", "the file is empty"),
        (b"# only a comment\n", "the file is empty"),
        ("base: x".encode("utf-16"), "UTF-16"),
        ("base: x".encode("utf-16-le"), "UTF-16"),
        ("name: é".encode("latin-1"), "not UTF-8"),
        (b"\x7fELF\x02\x01\x01\x00\x00", "binary"),
        (b"\x89PNG\r\n\x1a\n", "not UTF-8"),
        (b"- a\n- b\n", "a mapping of keys"),
        (b"just text", "a mapping of keys"),
        (b"base: [a\n", "not valid YAML"),
        (b"base: x\n---\nbase: y\n", "single document"),
        (b"base: !!python/object:os.system x\n", "could not determine a constructor"),
        (b"base: !!binary aGk=\n", "could not determine a constructor"),
        (b"base: !!int abc\n", "'abc' is not a whole number"),
        (b"base: !!bool maybe\n", "'maybe' is not a boolean"),
        (b'base: "\\ud800"\n', "\\ud800 cannot stand"),
        (b'base: "\\U00110000"\n', "not valid YAML"),
        (b'base: "a\\0b"\n', "\\u0000 cannot stand"),
        (b"base: " + b"9" * 5000, "a number of 5000 digits"),
        (b"base: " + b"[" * 20_000, "nested too deep"),
        (b"base: &a [*a]\n", "nested too deep"),
        (b"x" * (1 << 20) + b"yy", "too large to be a task"),
    ],
)
def test_files_that_are_not_a_task(tmp_path: Path, content: bytes, says: str) -> None:
    found = problems(tmp_path, content)
    assert says in str(found[0])
    assert str(tmp_path / "task.yaml") in found[0].where
    assert len(str(found[0])) < 500


def test_bom_is_not_content(tmp_path: Path) -> None:
    assert load(tmp_path, b"\xef\xbb\xbf" + MINIMAL.encode()).task.base.name == "tiny"


def test_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (problem,) = problems(tmp_path, "\n".join(lines))
    assert "entries with its aliases expanded" in problem.what


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "support.yaml").write_text(MINIMAL)
    for name, hint in (("suport.yaml", "'support.yaml'"), ("zzz", "support.yaml"), ("no/such/task.yaml", "init")):
        with pytest.raises(InputError, match="no such file") as error:
            load_config(tmp_path / name)
        assert hint in error.value.problems[0].fix
    with pytest.raises(InputError, match="a folder, not a file"):
        load_config(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        load_config(tmp_path / "support.yaml" / "x")
    with pytest.raises(InputError, match="cannot read"):
        load_config(tmp_path / ("x" * 300))
    with pytest.raises(InputError):
        load_config(tmp_path / "a\0b")


@pytest.mark.skipif(os.name == "nt" or not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_endless_file() -> None:
    with pytest.raises(InputError, match="too large"):
        load_config("/dev/zero")


# --- any input --------------------------------------------------------------------------------------------------------

keys = st.sampled_from(
    ["base", "data", "task", "train", "gate", "name", "rank", "labels", "prompts", "<<", "rank_pattern", "metric", "x"]
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats().map(lambda f: str(f).replace("inf", ".inf").replace("nan", ".nan")),
    st.text(max_size=8).map(lambda s: '"' + s.replace("\\", "").replace('"', "") + '"'),
    st.sampled_from(["*a", "&a x", "!!int x", "!!str", "&a [*a]", '"\\ud800"', "yes", "1:2", "=", "<<", "- x", "? y"]),
)


def flow(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(flow(inner) for inner in value) + "]"
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5), max_leaves=12
)
real_keys = st.sampled_from(
    [
        f"{section}.{key}"
        for section, field in config_module.Task.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    ]
)


def config_or_input_error(path: Path, overrides: list[str] | None = None) -> None:
    try:
        config = load_config(path, overrides or [])
    except InputError as error:
        assert error.problems
        assert all(len(str(p)) < 2000 for p in error.problems)
        str(error).encode()
        return
    config.section_hash("base", "data", "task", "train", "gate")  # every accepted value can be hashed
    assert config.run_dir.is_absolute()
    assert all(origin for _, _, origin in config.items())


@pytest.fixture(scope="module")
def any_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any") / "task.yaml"


@given(text=st.text() | trees.map(flow) | st.dictionaries(keys, trees, max_size=5).map(flow))
@example(text="base: x\n<<: [1, 2]")
@example(text="{base: x, data: y, task: z, train: {alpha: 1" + "0" * 99 + "}}")
@example(text="%YAML 1." + "9" * 5000 + "\n---\nx: 1")
@example(text="%TAG ! tag:%ff\n---\n!x y")
@example(text='base: "a\\x85b\\u2028"\ndata: d\ntask: m')
@example(text="? &a {x: 1}\n: *a")
@example(text="<<: &a {<<: *a}")
def test_any_text_gives_a_config_or_an_input_error(any_file: Path, text: str) -> None:
    any_file.write_bytes(text.encode("utf-8", "surrogatepass"))
    config_or_input_error(any_file)


@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_config_or_an_input_error(any_file: Path, data: bytes) -> None:
    any_file.write_bytes(data)
    config_or_input_error(any_file)


@given(key=real_keys, value=trees)
def test_any_value_of_any_key_gives_a_config_or_an_input_error(any_file: Path, key: str, value: object) -> None:
    any_file.write_text(MINIMAL)
    config_or_input_error(any_file, [f"{key}={flow(value)}"])


@given(override=st.text(max_size=30) | st.builds("{}={}".format, st.text(max_size=8), st.text(max_size=8)))
def test_any_override_gives_a_config_or_an_input_error(any_file: Path, override: str) -> None:
    any_file.write_text(MINIMAL)
    config_or_input_error(any_file, [override])


@pytest.mark.parametrize("name", ["support", "json"])
def test_what_a_run_keeps_of_its_task_is_the_task(name: str) -> None:
    task = load_config(Path(__file__).parents[1] / "examples" / name / "task.yaml").task
    assert Task.model_validate(freeze(json.loads(json.dumps(task.model_dump(mode="json"))))) == task
