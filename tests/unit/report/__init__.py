"""Of `pytest_nullspace.report`."""
