"""The networks and the files they come from. Importing the package imports no torch; its modules do."""
