"""Keys and values that attention keeps from call to call: as many as are stored, or at most so many."""
