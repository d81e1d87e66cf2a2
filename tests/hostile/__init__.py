"""What strangers and bad days do: hostile checkpoints, and machines that die."""
