"""Read, check, render, mask, split and pack labelled examples."""
