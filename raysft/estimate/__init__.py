"""What a run needs before it starts: memory of devices and nodes, storage, and time."""
