"""Methods compared over settings and seeds: runs the cells as processes, then makes tables of their numbers."""
