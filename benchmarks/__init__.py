"""What was measured (`results/`), and ideas that are measured against what we have (`ideas/`)."""
