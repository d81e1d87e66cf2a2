"""pytest's side: options, tests, hooks, and what the processes of a run share. It holds no arithmetic."""
