"""Keeps log-probs under fixed weights by token ids, and scores with teachers."""
