"""LoRA and DoRA adapters: layers that wrap frozen ones, injection by name, and strict files in PEFT's format.

``spec`` says which modules get which rank and scale, ``layers`` holds the two wrappers, ``inject`` swaps them in
and out, ``peft_config`` and ``files`` read and write PEFT's ``adapter_config.json`` and
``adapter_model.safetensors``. A layer carries one adapter: serving many adapters at once is not done here, nor is
training, merging into a checkpoint, or checking that an adapter belongs to a base.
"""
