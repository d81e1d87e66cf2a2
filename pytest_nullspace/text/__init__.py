"""From what an option names to windows of token ids. No code that lies in a checkpoint or a dataset is ever run."""
