"""What each CLI command does. The only place of the platform that imports engines, and only the CLI calls it."""
