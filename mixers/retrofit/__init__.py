"""A model that people already have keeps its function, then gives up its cache: HAM around its own attention."""
