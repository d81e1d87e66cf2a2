"""Tests; see the module names."""
