"""Find a base model, check it, name it by its content and load it frozen."""
