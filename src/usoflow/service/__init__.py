"""Jobs that outlive processes: a table of them, a worker process that runs them, and its supervisor."""
