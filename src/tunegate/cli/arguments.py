"""Types of arguments that several commands take. ``quantize.size`` reads sizes in bytes."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from ``low`` to ``high``, for the parser; None: any that are large enough."""
    expected = f"of {low} or more" if high is None else f"from {low} to {high:,}"

    def read(text: str) -> int:
        try:
            found = int(text) if text.isdecimal() else -1
        except ValueError:  # thousands of digits
            found = -1
        if found < max(0, low) or (high is not None and found > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {expected}")
        return found

    return read
