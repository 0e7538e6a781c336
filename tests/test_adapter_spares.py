"""Memory that is touched ahead: whoever takes it is the only one to write to it from then on."""

from __future__ import annotations

import torch

from tunegate.adapter.spares import Spares


def test_what_is_taken_is_not_written_to_any_more() -> None:
    spares = Spares(torch.float32)
    for _ in range(40):  # taken while it is being touched, as soon as there is something to take
        made = spares.take(1 << 20)
        made.fill_(7.0)
        spares.refill()
        taken = [spares.take(1 << 20) for _ in range(3)]
        for one in taken:
            one.fill_(3.0)
        assert len({one.data_ptr() for one in (made, *taken)}) == 4
        spares._touching.submit(lambda: None).result()  # it has looked at all that it was given
        assert float(made.min()) == float(made.max()) == 7.0
        assert all(float(one.min()) == float(one.max()) == 3.0 for one in taken)


def test_another_size_is_made_anew_and_large_ones_are_not_kept() -> None:
    spares = Spares(torch.bfloat16)
    assert spares.take(1000).shape == (1000,)
    spares.refill()
    assert spares.take(2000).shape == (2000,) and spares.take(1000).dtype == torch.bfloat16
    spares.take(1 << 26)
    spares.refill()
    assert not spares._kept
