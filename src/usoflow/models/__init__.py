"""The networks and the files they come from. The package and what only reads headers import no torch."""
