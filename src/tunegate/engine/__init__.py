"""The one training loop, exact resume, and batched generation, over any decoder-only model."""
