"""What must hold of a run, whether it does, and the training mistake behind what does not. Pure but for weights."""
