"""Of `pytest_nullspace.measuring`."""
