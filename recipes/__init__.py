"""The command line, `python -m recipes`, and the YAML files that describe runs."""
