"""Ready-made analyses: each file is a script and a readable example. The package never imports this folder."""
