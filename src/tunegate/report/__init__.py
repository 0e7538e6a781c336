"""What people look at in a browser: the spot-check of a run's answers (``review``, ``server``, ``page/``).

Pages are served to this machine alone and fetch nothing from elsewhere.
"""
