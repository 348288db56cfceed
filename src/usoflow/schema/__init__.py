"""What a node looks like from outside, and whether a prompt fits it. Knows no node and no model."""
