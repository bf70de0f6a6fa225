"""A look at every node of a job before its first step, so that a node that cannot take part is named."""
