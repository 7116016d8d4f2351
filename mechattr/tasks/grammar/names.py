"""First names of English prose with one usual gender; no test name occurs in a training sentence."""

from __future__ import annotations

MALE: dict[str, tuple[str, ...]] = {
    "train": (
        "John", "James", "Henry", "William", "George", "Charles", "Robert", "Thomas", "Edward", "Peter",
        "David", "Frank", "Arthur", "Paul", "Ralph", "Walter", "Philip", "Richard", "Joseph", "Jack",
    ),
    "test": ("Tom", "Sam", "Ben", "Harry", "Daniel", "Michael", "Stephen", "Simon", "Oliver", "Martin"),
}  # fmt: skip

FEMALE: dict[str, tuple[str, ...]] = {
    "train": (
        "Mary", "Anne", "Jane", "Emma", "Lucy", "Sarah", "Helen", "Martha", "Kate", "Emily",
        "Ellen", "Clara", "Susan", "Margaret", "Elizabeth", "Fanny", "Nancy", "Harriet", "Julia", "Dora",
    ),
    "test": ("Alice", "Amy", "Laura", "Ruth", "Agnes", "Catherine", "Lydia", "Esther", "Caroline", "Rachel"),
}  # fmt: skip
