"""What users train, as pure functions of named arrays."""
