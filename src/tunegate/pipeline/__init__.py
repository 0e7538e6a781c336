"""``run``: check, baseline, train with the eval gate, test, decide, card; each step resumable.

``prepare`` turns a task into checked data and a checked base; ``steps`` does the work, ``folders`` says where it
lies and what is done; ``card`` writes and verifies what travels with an adapter; ``run`` puts them in order.
"""
