"""Several plans in one file that varies a plan: what they share is trained once, and they are compared."""
