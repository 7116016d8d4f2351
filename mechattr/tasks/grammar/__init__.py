"""Grammars that draw prompt pairs as plain text; standard library only, so that a training script can use them."""
