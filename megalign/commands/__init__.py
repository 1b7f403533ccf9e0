"""Commands that need no ranks: what configurations may say, whole examples of them, and starting the ranks."""
