"""The plan file: YAML text parsed, checked and converted to a Plan."""
