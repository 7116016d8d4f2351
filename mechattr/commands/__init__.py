"""Parts of the command line: what commands show, and those that take prompts."""
