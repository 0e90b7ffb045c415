"""What the engine needs from the world, as Protocols: stores, key-value floors, targets."""
