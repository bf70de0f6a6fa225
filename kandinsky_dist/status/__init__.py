"""How a run is doing, from the files of its folder alone. No torch."""
