"""Runs a prompt, node by node, and keeps what need not be computed again."""
