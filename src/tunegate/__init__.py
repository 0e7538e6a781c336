"""From labelled examples to a LoRA adapter that is measured, gated and versioned."""

__version__ = "0.1.0"
