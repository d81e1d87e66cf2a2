"""A checkpoint and settings in, a run out: the model loaded, text run through it once, hooks that take norms."""
