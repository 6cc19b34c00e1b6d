"""Output for people: text, progress bars and files."""
