"""Where sagas meet other parts of a system: the boundary types that both sides import."""
