"""Score answers item by item, put intervals around the scores, and compare subjects on the same items.

``metrics`` turns a prediction and its reference into a number between 0 and 1; ``statistics`` turns those numbers
into scores and paired comparisons. Whether a score is good enough is the gate's question, not this module's.
"""
