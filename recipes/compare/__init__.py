"""Several mixers on one task, several seeds: runs, table and plots."""
