"""What a checkpoint holds, and what it is used for."""
