"""Adapters by what they are: content hash, base, data, scores, decision, state; on SQLite or PostgreSQL.

``database`` and ``tables`` hold facts, ``store`` holds bytes by content hash. ``intake`` turns an adapter folder into
both; ``adding``, ``states``, ``bases`` and ``lineage`` are what can be done with them; ``upkeep`` proves that every
byte is still what it was; ``publish`` tells other systems. It trains and scores nothing.
"""
