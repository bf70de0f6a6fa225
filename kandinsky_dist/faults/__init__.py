"""What can go wrong while a run is under way: stop requests, divergence, hangs."""
