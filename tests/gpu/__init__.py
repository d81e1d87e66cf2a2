"""What only a card shows: its tests, and ``python -m tests.gpu``, the first thing to run where one can be had."""
