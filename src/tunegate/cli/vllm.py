"""``--engine vllm``: its options, and the engine they describe; an adapter that has to be merged is merged first.

vLLM pays for the largest rank and the number of adapters it may meet, so both follow from the adapters that are known
at the start unless they are given. It loads no adapter: the catalogue does, through the engine.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunegate.cli.arguments import whole
from tunegate.cli.console import Console
from tunegate.cli.quantize import size
from tunegate.errors import InputError, Problem

if TYPE_CHECKING:
    from tunegate.serve.vllm import VllmOptions

DEFAULT_RANK, DEFAULT_LORAS, MOST_LORAS, IN_RAM = 64, 4, 8, 64


def add_vllm_options(parser: argparse.ArgumentParser) -> None:
    """The options that only ``--engine vllm`` has, beside the interpreter."""
    group = parser.add_argument_group("with --engine vllm")
    group.add_argument("--tensor-parallel", type=whole(1), default=1, metavar="N", help="GPUs that share each layer")
    group.add_argument(
        "--pipeline-parallel", type=whole(1), default=1, metavar="N", help="groups that share the layers"
    )
    group.add_argument(
        "--nodes", type=whole(1), default=1, metavar="N", help="of a Ray cluster that stands (RAY_ADDRESS)"
    )
    group.add_argument("--max-lora-rank", type=whole(1), metavar="R", help="default: the largest at the start, or 64")
    group.add_argument(
        "--max-loras", type=whole(1), metavar="N", help="adapters in a batch; default: those at the start"
    )
    group.add_argument("--vllm-kv-cache", type=size, default=0, metavar="SIZE", help="default: vLLM's own choice")
    group.add_argument(
        "--vllm-option", action="append", default=[], metavar="OPTION", help="of vLLM's own, such as =--enforce-eager"
    )


def vllm_options(
    arguments: argparse.Namespace, base: Path, base_name: str, fingerprint: str, adapters: Mapping[str, Path],
    console: Console,
) -> VllmOptions:  # fmt: skip
    """What to start vLLM with. ``base``: its folder, of that name and content hash; ``adapters``: folders known now.
    With DoRA, the merged model, proven equal to the adapter on its base. :class:`InputError` where vLLM would need
    several models."""
    from tunegate.adapter.files import read_spec
    from tunegate.export.vllm import RANKS
    from tunegate.files import home
    from tunegate.serve.vllm import VllmOptions

    work = home() / "vllm" / fingerprint.removeprefix("b3:")[:16]
    specs = {name: read_spec(folder) for name, folder in adapters.items()}
    options = VllmOptions(
        base, arguments.vllm_python, work, 0, arguments.compute_dtype, arguments.max_context, arguments.max_rows,
        arguments.vllm_kv_cache, tensor_parallel=arguments.tensor_parallel,
        pipeline_parallel=arguments.pipeline_parallel, nodes=arguments.nodes,
        trust_remote_code=arguments.trust_remote_code, more=tuple(arguments.vllm_option),
    )  # fmt: skip
    if dora := [name for name, spec in specs.items() if spec.use_dora]:
        return _merged(options, dora, adapters, base_name, console)
    largest = max((max([s.rank, *map(int, s.rank_pattern.values())]) for s in specs.values()), default=DEFAULT_RANK)
    rank = arguments.max_lora_rank or next((size for size in RANKS if size >= max(16, largest)), RANKS[-1])
    loras = arguments.max_loras or min(len(specs) or DEFAULT_LORAS, MOST_LORAS)
    return replace(options, max_rank=rank, loras=loras, cpu_loras=max(IN_RAM, loras, len(specs)))


def _merged(
    options: VllmOptions, dora: list[str], adapters: Mapping[str, Path], base_name: str, console: Console
) -> VllmOptions:
    from tunegate.adapter.files import adapter_hash
    from tunegate.pipeline.merge import MergeRequest, merge

    if len(adapters) > 1:
        fix = "a server for each (`tunegate deploy separate`), or --engine native, which serves DoRA beside others"
        raise InputError(
            [Problem("vLLM takes no DoRA, and a merged model is all that its server has", name, "one adapter",
                     f"{len(adapters)} adapters", fix) for name in dora]
        )  # fmt: skip
    folder = adapters[dora[0]]
    key = adapter_hash(folder)
    out = options.work / "merged" / key.removeprefix("b3:")
    if not out.is_dir():  # a merge appears whole
        console.line(f"{dora[0]} is a DoRA adapter: vLLM gets the merged model")
        out.parent.mkdir(parents=True, exist_ok=True)
        merge(MergeRequest((folder,), out, base=base_name), console)
    return replace(options, base=out, merged=key, loras=0)
