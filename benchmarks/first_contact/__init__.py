"""First contact with a GPU: a folder compiled ahead, and checks that run it without a compiler."""
