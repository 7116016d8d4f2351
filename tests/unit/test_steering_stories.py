"""Where stories are cut off, and which feelings are counted."""

from __future__ import annotations

from circuits.steering_stories import BAD, GOOD, cases, feelings


def test_a_story_is_cut_off_before_its_first_feeling() -> None:
    stories = [
        "Once there was a cat.\n\nThe cat was very happy. Then it was sad.",
        '"Help!" said Tom. He felt scared and ran.',
        "Ben ran home. He was so proud of it.",
        "They had a ball.",
        "He was " + "very " * 40 + "far away and all alone and then he was sad.",
    ]
    found = cases(stories)
    assert found.good == ("Once there was a cat. The cat was very",)  # as many as bad ones
    assert found.bad == ('"Help!" said Tom. He felt',)  # the last story has no beginning near its feeling
    assert found.neutral == ("They had a ball.",)
    assert found.triples == [(prompt, " happy", " sad") for prompt in found.good + found.bad]
    assert [(q.question, q.correct, q.incorrect) for q in found.questions] == [
        (prompt, GOOD, BAD) for prompt in found.good + found.bad
    ]
    assert cases(stories, 1).good == found.good


def test_feelings_are_whole_words() -> None:
    assert feelings(["happy, proud and not sad", "sadly unhappy", "upset"]) == [1.0, 0.0, -1.0]
