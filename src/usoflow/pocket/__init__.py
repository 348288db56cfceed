"""Small models of exactly the official architecture and file layout, which run in seconds on a CPU."""
