"""Mixtures of experts: which modules route tokens, and which hold experts that no linear layer stands for.

transformers keeps the experts of a block in one parameter of three dimensions, and its router in a class of its own or
in a linear layer. A router is known by its name, ``gate`` only beside experts: a gate in another place is no router.

It knows nothing of how experts compute.
"""

from __future__ import annotations

from torch import nn

EXPERTS = ("experts", "shared_expert", "shared_experts")


def is_router(model: nn.Module, path: str) -> bool:
    """Whether the module at ``path``, or one around it, decides which experts a token goes to."""
    parts = path.split(".")
    for depth, name in enumerate(parts):
        if name in ("router", "shared_expert_gate"):
            return True
        if name == "gate":
            block = model.get_submodule(".".join(parts[:depth]))
            if any(hasattr(block, experts) for experts in EXPERTS):
                return True
    return False


def fused_experts(model: nn.Module) -> list[str]:
    """Paths of the modules that hold many experts' matrices in parameters of three dimensions."""
    return [
        path
        for path, module in model.named_modules()
        if path.rpartition(".")[2] == "experts" and any(p.ndim == 3 for p in module.parameters(recurse=False))
    ]
