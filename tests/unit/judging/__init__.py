"""Of `pytest_nullspace.judging`."""
