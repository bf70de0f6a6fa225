"""What is in tars that others wrote: sidecars, manifests, and subsets of them."""
