"""What can go wrong while a run is under way: stop requests, non-finite steps, hangs."""
