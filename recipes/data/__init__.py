"""The recipes of --data: what to train on, for how long, and the model that fits it."""
