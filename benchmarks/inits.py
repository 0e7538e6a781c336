"""Whether starting an adapter from the base's own singular vectors beats starting it at zero, at equal steps.

    python benchmarks/inits.py --set train.tokens_per_step=128    # examples/support, forty runs, each under a minute
    python benchmarks/inits.py --task my.yaml --steps 60 --rates 3e-4 1e-3 3e-3 --seeds 1 2 3 4 5
    python benchmarks/inits.py --most 4                           # four runs, then stop

A command that was stopped takes the runs that are missing when it is given again with the same settings and output.

Every start is put on the product's own layers and trained by its own loop, on the same batches, without dropout:

- ``zero``: A random, B = 0. The base is W, or nf4(W).
- ``pissa`` (arXiv 2404.02948): s B A = the leading ``rank`` singular triplets of W, split evenly; the base is the rest
  R = W - s B A, in 4 bits nf4(R), which is another base than nf4(W).
- ``loftq`` (arXiv 2310.08659, one round): s B A = the leading triplets of W - nf4(W), on the base nf4(W).
- ``loftq5``: five rounds of Q = nf4(W - s B A), s B A = triplets of W - Q; the base is the last Q.

Singular triplets are exact (eigenvectors of the Gram matrix in fp64). Each start gets the learning rate with the lowest
validation loss on a seed of its own, and is then measured over other seeds, which change the order of the rows and, for
``zero``, A. What counts is the loss on the test split after the last step: a start shows a gain if the 95 % interval
(Student) of its paired difference to ``zero`` on the same precision lies below 0. The last line is one JSON object. No
speed is measured, so a busy machine does no harm.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

EXAMPLE = common.HERE.parent / "examples" / "support" / "task.yaml"
ARMS = ("fp32 zero", "fp32 pissa", "nf4 zero", "nf4 loftq", "nf4 pissa", "nf4 loftq5")
Start = tuple[Tensor, Tensor, Any]  # s B A as (A, B), and the base's weight: a matrix, or its codes


def triplets(matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, k) and B (n, rank) in fp32 with ``scale * B A`` the best approximation of ``matrix`` (n, k)."""
    wide = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().t()
    right = torch.linalg.eigh(wide.t() @ wide).eigenvectors[:, -rank:].flip(1)  # (min(n, k), rank)
    left = wide @ right
    sizes = torch.linalg.vector_norm(left, dim=0).clamp_min(1e-300)
    root = (sizes / scale).sqrt()
    up, down = left / sizes * root, right * root
    a, b = (down, up) if wide.shape == matrix.shape else (up, down)
    return a.t().float().contiguous(), b.float().contiguous()


def start_of(arm: str, weight: Tensor, rank: int, scale: float) -> Start | None:
    """What ``arm`` makes of one weight (n, k) in fp32; None for a start at zero on the unchanged base."""
    from tunegate.kernels.nf4 import dequantize, quantize

    precision, name = arm.split()
    if name == "zero":
        return None
    if name == "pissa":
        a, b = triplets(weight, rank, scale)
        rest = weight - scale * (b @ a)
        return a, b, rest if precision == "fp32" else quantize(rest)
    codes = quantize(weight)
    a, b = triplets(weight - dequantize(codes), rank, scale)
    for _ in range(4 if name == "loftq5" else 0):
        codes = quantize(weight - scale * (b @ a))
        a, b = triplets(weight - dequantize(codes), rank, scale)
    return a, b, codes


class Bench:
    """One arm's base in memory, trained on again and again."""

    def __init__(self, prepared: Any, arm: str):
        from tunegate.adapter.inject import find_targets
        from tunegate.data.types import Rendered
        from tunegate.engine.runner import Runner
        from tunegate.kernels.nf4 import QuantizedLinear, quantize_linears
        from tunegate.model.loading import load_model
        from tunegate.pipeline.session import adapter_spec

        self.prepared, self.spec = prepared, adapter_spec(prepared.config.task.train)
        model = load_model(prepared.base.resolved, dtype=torch.float32)
        self.starts: dict[str, tuple[Tensor, Tensor]] = {}
        for path, layer in find_targets(model, self.spec)[0].items():
            made = start_of(arm, layer.weight, self.spec.rank_for(path), self.spec.scale_for(path))  # type: ignore[arg-type]
            if made is not None:
                self.starts[path] = made[:2]
                if isinstance(made[2], Tensor):
                    layer.weight = nn.Parameter(made[2], requires_grad=False)
                else:
                    model.set_submodule(path, QuantizedLinear(made[2], layer.bias))  # type: ignore[arg-type]
        if arm.startswith("nf4"):
            quantize_linears(model)
        self.runner = Runner(model)
        render = prepared.base.renderer.render_many
        test = [row for row in render(prepared.data.splits.test) if isinstance(row, Rendered) and row.n_targets]
        self.rows = {"valid": prepared.valid_rows, "test": test}
        self.before: float | None = None

    def run(self, rate: float, seed: int, steps: int, split: str) -> dict[str, Any]:
        """One training: the loss of ``split`` afterwards, that of the test rows before, and that of every step."""
        from tunegate.adapter.inject import inject, remove
        from tunegate.engine.train import Hooks, mean_loss, train

        settings = self.prepared.config.task.train.model_copy(
            update={"lr": rate, "seed": seed, "max_steps": steps, "dropout": 0.0, "epochs": 100.0,
                    "eval_every": 10**9, "checkpoint_every": 10**9}
        )  # fmt: skip
        injection = inject(self.runner.model, self.spec, seed=seed)
        with torch.no_grad():
            for path, (a, b) in self.starts.items():
                injection.modules[path].lora_A.copy_(a)
                injection.modules[path].lora_B.copy_(b)

        losses: list[float] = []
        hooks = Hooks(lambda step: (0.0, {}), lambda e: losses.append(e["loss"]) if e["event"] == "step" else None)
        if self.before is None:  # whatever the seed: at zero the random A does nothing
            self.before = mean_loss(self.runner, self.rows["test"], settings.tokens_per_batch)
        with tempfile.TemporaryDirectory(prefix="tunegate-bench-") as folder:
            train(self.runner, injection, self.prepared.train_rows, settings, Path(folder) / "run", "bench", hooks)
        after = mean_loss(self.runner, self.rows[split], settings.tokens_per_batch)
        remove(self.runner.model)
        return {"before": self.before, "after": after, "losses": losses}


def wanted(
    done: list[dict[str, Any]], rates: list[float], seeds: list[int], arms: list[str]
) -> Iterator[tuple[str, float, int, bool]]:
    """The runs that are still to be taken, as (arm, rate, seed, whether it chooses the rate). ``done`` may grow."""
    taken = lambda: {(r["arm"], r["rate"], r["seed"], r["choosing"]) for r in done}  # noqa: E731
    for arm in arms:
        tried = sorted(rates)
        while True:
            left = [rate for rate in tried if (arm, rate, min(seeds) - 1, True) not in taken()]
            if left:
                yield arm, left[0], min(seeds) - 1, True
            elif (best := chosen_rate(done, arm)) == tried[0]:  # a best one at the end may not be the best
                tried = [float(f"{best**2 / tried[1]:.2g}"), *tried]
            elif best == tried[-1]:
                tried.append(float(f"{best**2 / tried[-2]:.2g}"))
            else:
                break
        for seed in seeds:
            if (run := (arm, chosen_rate(done, arm), seed, False)) not in taken():
                yield run


def chosen_rate(runs: list[dict[str, Any]], arm: str) -> float:
    tried = [r for r in runs if r["arm"] == arm and r["choosing"]]
    return min(tried, key=lambda r: r["after"])["rate"]


def measured(runs: list[dict[str, Any]], arm: str) -> dict[int, dict[str, Any]]:
    """Seed -> the run at the chosen rate."""
    found = [r for r in runs if r["arm"] == arm and not r["choosing"]]
    return {r["seed"]: r for r in found if r["rate"] == chosen_rate(runs, arm)}


def difference(values: list[float]) -> dict[str, float]:
    """Mean of paired differences with its 95 % interval by Student's t."""
    from scipy.special import stdtrit

    middle = statistics.mean(values)
    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": middle, "low": middle - half, "high": middle + half}


MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "before": lambda r: r["before"],
    "curve": lambda r: statistics.mean(r["losses"]),
    "test": lambda r: r["after"],
}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Arm -> its rate, the mean of each measure, and the differences to ``zero`` on the same precision."""
    found: dict[str, Any] = {}
    for arm in ARMS:
        if not (by_seed := measured(runs, arm)):
            continue
        found[arm] = {"rate": chosen_rate(runs, arm), "seeds": sorted(by_seed)}
        found[arm] |= {name: statistics.mean(map(of, by_seed.values())) for name, of in MEASURES.items()}
        zero = measured(runs, f"{arm.split()[0]} zero")
        shared = sorted(by_seed.keys() & zero.keys())
        if not arm.endswith("zero") and len(shared) > 1:
            pairs = {name: [of(by_seed[s]) - of(zero[s]) for s in shared] for name, of in MEASURES.items()}
            found[arm]["difference"] = {name: difference(values) for name, values in pairs.items()}
            found[arm]["gain"] = found[arm]["difference"]["test"]["high"] < 0
    return found


def markdown(result: dict[str, Any]) -> str:
    rows = []
    for arm, one in result["summary"].items():
        gaps = one.get("difference", {})
        shown = [
            f"{g['mean']:+.4f} ({g['low']:+.4f} to {g['high']:+.4f})"
            for name in ("curve", "test")
            if (g := gaps.get(name))
        ]
        numbers = [f"{one[name]:.4f}" for name in MEASURES]
        rows.append([arm, f"{one['rate']:g}", *numbers, *(shown or ["", ""])])
    header = ["start", "rate", "test loss before", "mean training loss", "test loss after"]
    header += ["training, less zero", "test, less zero"]
    tried = []
    for arm in result["summary"]:
        runs = sorted((r["rate"], r["after"]) for r in result["runs"] if r["arm"] == arm and r["choosing"])
        tried.append([arm, ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in runs)])
    settings = result["settings"]
    return "\n\n".join([
        f"# Starts of an adapter: {settings['task']}", common.describe(result["machine"]),
        f"{settings['steps']} steps of about {settings['tokens_per_step']} row tokens, rank {settings['rank']}, alpha "
        f"{settings['alpha']:g}, no dropout, {len(settings['seeds'])} seeds; nats per target token.",
        common.table(header, rows),
        common.table(["start", "validation loss by learning rate, on the seed that chooses it"], tried),
    ])  # fmt: skip


def write(result: dict[str, Any], output: Path) -> None:
    result["summary"] = summary(result["runs"])
    common.write("inits", result, markdown(result), output)


def main() -> None:
    from tunegate.config import load_config
    from tunegate.pipeline.prepare import prepare
    from tunegate.pipeline.reporter import Silent

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", type=Path, default=EXAMPLE)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=list(ARMS[:-1]), choices=ARMS, help="default: all but loftq5")
    parser.add_argument("--most", type=int, default=10**9, metavar="N", help="stop after N runs")
    parser.add_argument("--output", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    prepared = prepare(load_config(args.task, args.overrides), Silent())
    train = prepared.config.task.train
    settings = {
        "task": prepared.config.name, "overrides": args.overrides, "steps": args.steps, "rates": args.rates,
        "seeds": args.seeds, "rank": train.rank, "alpha": prepared.config.alpha,
        "tokens_per_step": train.tokens_per_step,
        "base": prepared.base.fingerprint.total, "data": sorted(prepared.data.files.values()),
    }  # fmt: skip
    path = args.output / "inits.json"
    result: dict[str, Any] = {"machine": common.machine(), "settings": settings, "runs": []}
    if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8")))["settings"] == settings:
        result = found
    bench: tuple[str, Bench] | None = None
    for number, (arm, rate, seed, choosing) in enumerate(wanted(result["runs"], args.rates, args.seeds, args.arms)):
        if number == args.most:
            break
        if bench is None or bench[0] != arm:
            bench = arm, Bench(prepared, arm)
            bench[1].before = next((r["before"] for r in result["runs"] if r["arm"] == arm), None)
        split = "valid" if choosing else "test"
        run = bench[1].run(rate, seed, args.steps, split)
        result["runs"].append({"arm": arm, "rate": rate, "seed": seed, "choosing": choosing, **run})
        write(result, args.output)
        print(f"{arm}, rate {rate:g}, seed {seed}: {split} loss {run['after']:.4f}", flush=True)
    write(result, args.output)
    print(json.dumps({arm: {k: v for k, v in one.items() if k != "seeds"} for arm, one in result["summary"].items()}))


if __name__ == "__main__":
    main()
