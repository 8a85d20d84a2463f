"""Bundle an artifact with all that runs it on a machine that has only Python."""
