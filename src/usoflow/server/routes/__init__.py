"""The HTTP API, one file per resource; every route is there with and without `/api` (`guard`)."""
