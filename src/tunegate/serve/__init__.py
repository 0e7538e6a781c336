"""An OpenAI-compatible server: many adapters on one base, in one batch."""
