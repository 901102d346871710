"""The engine as a worker in a cluster: the wires of others, spoken as they are."""
