"""The tests of pytest-nullspace."""
