"""Side-by-side measurements against the physical floor and against peers. They record; they do not gate."""
