"""Workflows (what the editor saves) and prompts (what is executed), and the way from one to the other."""
