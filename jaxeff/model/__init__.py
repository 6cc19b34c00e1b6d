"""Models as pure functions of named arrays."""
