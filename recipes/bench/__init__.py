"""Speed and memory, head to head; what the kernels cost, and whether they are right on this machine."""
