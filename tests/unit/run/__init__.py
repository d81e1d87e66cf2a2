"""Of `pytest_nullspace.run`."""
