"""A checked folder into a frozen model and a fast tokenizer.

transformers supplies the model definition and reads the safetensors; this module refuses everything that
transformers lets pass with a warning: encoder-decoders, encoders, checkpoints with missing tensors (which would
be random numbers) or tensors of another shape. ``tokenizer.json`` is taken as it is: transformers 5 rebuilds
some classes (GPT2Tokenizer is one) from the vocabulary alone and so loses the published pre-tokenizer.

It moves nothing to a device and swaps no layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunegate.errors import InputError, Problem, nearest
from tunegate.kernels.formats import Recipe
from tunegate.model.resolve import ResolvedBase
from tunegate.model.streaming import Rearranged, is_quantized, keeps_16_bits, load_streamed
from tunegate.model.weights import load_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def load_model(
    base: ResolvedBase | Path, *, dtype: torch.dtype, recipe: Mapping[str, Any] | None = None,
    narrow: bool = False, trust_remote_code: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """The base on the CPU in ``dtype``, in eval mode, no parameter requiring a gradient.

    ``recipe`` (format, block, double, keep, stored) quantizes its linear layers on the way
    (:mod:`tunegate.model.streaming`), unless the folder's are stored so. ``narrow``: a bf16 checkpoint that computes in
    fp32 keeps 16 bits in memory, layers of :mod:`tunegate.kernels.stored` taking the place of ``nn.Linear``; the rare
    architecture that rearranges its tensors is widened all the same.
    Raises :class:`InputError` if it is not a decoder-only causal LM, if tensors are missing or have other
    shapes, or if transformers cannot read it. A head tied to the embedding does not count as missing.
    """
    from transformers import AutoModelForCausalLM

    folder = base.path if isinstance(base, ResolvedBase) else base
    config = _causal_config(folder, trust_remote_code)
    if recipe is not None or is_quantized(folder):
        given = None if recipe is None or recipe.get("stored") else Recipe.from_json(recipe)
        keep = () if recipe is None else recipe["keep"]
        return load_streamed(
            folder, config, dtype=dtype, recipe=given, keep=keep, trust_remote_code=trust_remote_code
        ).model
    if narrow and dtype == torch.float32 and keeps_16_bits(folder):
        with contextlib.suppress(Rearranged):
            return load_streamed(folder, config, dtype=dtype, recipe=None, trust_remote_code=trust_remote_code).model
    loader: Any = AutoModelForCausalLM  # its annotations do not know output_loading_info
    try:
        model, info = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are all listed, and then refused below
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise InputError(
            "transformers cannot load this base", where=str(folder), got=_brief(error), fix=_VERSION_FIX
        ) from error
    problems = _loading_problems(folder, info)
    if problems:
        raise InputError(problems)
    model.requires_grad_(False)
    model.eval()
    return model


_VERSION_FIX = "check that the installed transformers knows this model, and that the folder is whole"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _causal_config(folder: Path, trust_remote_code: bool) -> Any:
    """The folder's config, if it is a decoder-only causal LM's."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config from outside can fail in any check of its class
        raise InputError(
            "transformers cannot read this config",
            where=str(folder / "config.json"),
            got=_brief(error),
            fix=_VERSION_FIX,
        ) from error
    architectures = list(getattr(config, "architectures", None) or [])
    reason = ""
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder"
    elif architectures and not any(name.endswith(_CAUSAL_HEADS) for name in architectures):
        reason = "its weights belong to another kind of model"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (
        trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    ):
        reason = "transformers has no causal language model of this type"
    if reason:
        raise InputError(
            f"this base cannot be used: {reason}",
            where=str(folder / "config.json"),
            expected="a decoder-only causal language model, such as LlamaForCausalLM",
            got=f"model_type {config.model_type!r}, architectures {architectures}",
            fix="choose a base whose page says text generation",
        )
    return config


def _loading_problems(folder: Path, info: dict[str, Any]) -> list[Problem]:
    problems = []
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        problems.append(
            Problem(
                f"{len(missing)} tensors of the model are not in the weights",
                str(folder),
                "every parameter of the architecture in config.json",
                ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else ""),
                "the weights belong to another architecture or are not whole: fetch the base again",
            )
        )
    for name, got, expected in sorted(info.get("mismatched_keys") or ()):
        problems.append(
            Problem(f"tensor {name!r} has another shape", str(folder), str(tuple(expected)), str(tuple(got)))
        )
    problems += [Problem("transformers reports", str(folder), got=m) for m in info.get("error_msgs") or ()]
    return problems


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The folder's fast tokenizer. :class:`InputError` if there is none or it cannot be read."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    as_published = (path / "tokenizer.json").is_file() and not (trust_remote_code and _own_tokenizer(path))
    loader: Any = PreTrainedTokenizerFast if as_published else AutoTokenizer
    extra = {} if as_published else {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = loader.from_pretrained(path, local_files_only=True, **extra)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(
            "the tokenizer cannot be read",
            where=str(path),
            got=_brief(error),
            fix="the folder needs the tokenizer.json that belongs to the base",
        ) from error
    if not tokenizer.is_fast:
        raise InputError(
            "the base has no fast tokenizer",
            where=str(path),
            expected="tokenizer.json, read by the tokenizers library",
            got=type(tokenizer).__name__,
            fix="convert it once with transformers and save it: `tokenizer.save_pretrained(folder)`",
        )
    return tokenizer


def eos_ids(folder: Path) -> tuple[int, ...]:
    """The end-of-text ids of the base's generation config."""
    path = folder / "generation_config.json"
    found = load_object(path).get("eos_token_id") if path.exists() else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int for i in ids):
        raise InputError(
            "not token ids",
            where=f"{path}: eos_token_id",
            expected="a number or a list of numbers",
            got=repr(found)[:120],
            fix="mend the file, or fetch the base again",
        )
    return tuple(ids)


def _own_tokenizer(path: Path) -> bool:
    config = path / "tokenizer_config.json"
    return config.is_file() and bool(load_object(config).get("auto_map"))


def choose_dtype(
    requested: str, *, device: str | None = None, cpuinfo: Path = Path("/proc/cpuinfo")
) -> tuple[torch.dtype, str]:
    """The compute dtype for ``auto``, ``float32`` or ``bfloat16``, and the reason to print beside it.

    ``device`` is a torch device type; by default ``cuda`` where torch sees a GPU, else ``cpu``. ``cpuinfo`` is
    the kernel's description of the processor.
    """
    if requested in DTYPES:
        return DTYPES[requested], "as asked"
    if requested != "auto":
        names = ["auto", *DTYPES]
        raise InputError("unknown dtype", expected=", ".join(names), got=repr(requested), fix=nearest(requested, names))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes bf16 natively"
        return torch.float32, "this GPU has no bf16 instructions"
    if device != "cpu":
        return torch.float32, f"bf16 is not assumed on {device!r}"
    flags = _cpu_flags(cpuinfo) & {"avx512_bf16", "amx_bf16"}
    if flags:
        return torch.bfloat16, f"this CPU has bf16 instructions ({', '.join(sorted(flags))})"
    return torch.float32, "this CPU has no AVX-512 or AMX bf16 instructions; fp32 is faster"


def choose_device(wanted: str, where: str = "train.device") -> str:
    """``auto`` is CUDA where torch sees it, else the CPU. :class:`InputError`, about the setting ``where``."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise InputError("unknown device", where=where, expected="auto, cpu, cuda or cuda:N", got=wanted) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("torch sees no CUDA GPU", where=where, got=wanted, fix="use auto or cpu")
    return wanted


def longest_row(config: Mapping[str, Any]) -> int | None:
    """The longest row, in tokens, that a ``config.json`` speaks of; None if it does not say."""
    text = config.get("text_config")
    for source in (text if isinstance(text, dict) else {}, config):
        for name in ("max_position_embeddings", "n_positions"):
            if type(source.get(name)) is int and source[name] > 0:
                return int(source[name])
    return None


def _cpu_flags(cpuinfo: Path) -> set[str]:
    """Instruction sets of the first processor; empty where the system does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return set()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()


def empty_model(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that ``folder/config.json`` describes, on the meta device: shapes without memory."""
    from transformers import AutoModelForCausalLM

    config = _causal_config(folder, trust_remote_code)
    loader: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return loader.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, RuntimeError, ImportError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            "transformers cannot build this model", where=str(folder), got=_brief(error), fix=_VERSION_FIX
        ) from error
