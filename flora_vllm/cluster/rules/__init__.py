"""What decides in the cluster, apart from what it is told by: no Ray, no engine, not even torch."""
