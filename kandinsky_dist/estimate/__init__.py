"""What a run will need before anybody queues for it: memory by part, and the time of a step."""
