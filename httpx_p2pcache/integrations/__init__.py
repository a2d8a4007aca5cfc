"""The same cache for other clients: each module imports the one library that it is for."""
