"""LightningModules, DataModules, metrics and callbacks. Importing this package imports nothing heavy."""
