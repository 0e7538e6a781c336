"""A small task on a tiny base, for the tests of the pipeline and the command line: a second or two for a whole run."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

from tiny import toy_rows

TASK = """\
base: {base}
data:
  train: rows.jsonl
  valid_fraction: 0.15
  test_fraction: 0.15
task:
  metric: accuracy
  report: likelihood
  max_new_tokens: 6
  prompt_items: 8
  prompts:
    - name: brief
      system: Answer with one word.
train:
  rank: 8
  lr: 0.02
  epochs: 2
  dropout: 0.05
  tokens_per_step: 256
  eval_items: 12
  checkpoint_every: 4
gate:
  min_test_items: 5
"""


def write_task(folder: Path, base: Path, rows: int = 120) -> Path:
    """``task.yaml`` and its ``rows.jsonl`` in ``folder``; returns the YAML's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy_rows(rows)), encoding="utf-8")
    path = folder / "task.yaml"
    path.write_text(TASK.format(base=json.dumps(str(base))), encoding="utf-8")
    return path


def replace_line(path: Path, old: str, new: str) -> None:
    """Change one text of a file that stands there exactly once."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


class Said(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Said:
    """Run ``tunegate ARGUMENTS`` in this process."""
    from tunegate.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as exit_:  # argparse
            code = int(exit_.code or 0)
    return Said(code, out.getvalue(), err.getvalue())
