"""From a file or an object to a checked `RunConfig`."""
