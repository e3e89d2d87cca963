"""The plan file: YAML text read, checked and turned into a Plan."""
