"""A language model as judge: answers scored 1 to 5 against a rubric, or compared in pairs, and how far to trust it.

``rubric`` holds what is asked and the JSON schema of the reply, ``providers`` asks a model, ``http`` is the plain
OpenAI-compatible one, ``ask`` repeats, paces, pays and caches, ``items`` makes scores of replies, ``results`` measures
and files of scores, ``agreement`` compares raters. Whether a score is good enough is the gate's question.
"""
