"""The pure core: everything that can happen to an instance, as a value."""
