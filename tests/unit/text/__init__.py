"""Of `pytest_nullspace.text`."""
