"""Of `pytest_nullspace.checkpoint`."""
