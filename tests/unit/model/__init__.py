"""Of `pytest_nullspace.model`."""
