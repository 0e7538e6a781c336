"""``plan``: what a run will take, said before it begins.

``shapes`` reads a model's shape without its weights, ``memory`` counts bytes per component, ``time`` counts
operations, ``devices`` holds the table of machines and prices, ``recommend`` says what fits and why, ``published``
compares with figures that others measured, ``calibrate`` learns from runs on this machine.
"""
