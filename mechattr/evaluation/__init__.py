"""How good a result is: against exact effects, against other methods, and as a circuit."""
