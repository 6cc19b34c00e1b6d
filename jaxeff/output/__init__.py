"""What people see while and after they wait: text, progress, files."""
