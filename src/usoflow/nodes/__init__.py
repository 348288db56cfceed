"""The nodes of a workflow: thin typed functions, one file per menu group."""
