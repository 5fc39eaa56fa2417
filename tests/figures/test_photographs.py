"""Photographs with the answers of two models."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from vitbench.base.errors import InputError
from vitbench.figures import changed_answers


def one_hot(answers, classes=3):
    return np.eye(classes)[answers] * 0.8 + 0.2 / classes


def test_only_changed_answers_are_shown_and_counted():
    labels, images = np.array([0, 1, 2, 0]), np.zeros((4, 32, 32, 3), np.uint8)
    before, after = one_hot([0, 1, 2, 1]), one_hot([0, 2, 2, 0])
    figure, sentence = changed_answers(images, labels, before, after, ["cat", "dog", "owl"], names=("fp32", "3 bits"))
    assert sentence == "of 4 photographs 1 are right with fp32 and wrong with 3 bits, 1 the other way round"
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.images]
    assert titles == ["dog\nfp32: dog 87 %\n3 bits: owl 87 %", "cat\nfp32: dog 87 %\n3 bits: cat 87 %"]
    plt.close(figure)


def test_equal_answers_say_so():
    figure, sentence = changed_answers(
        np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1]), one_hot([0, 1]), one_hot([0, 1]), "abc"
    )
    assert "0 are right with before" in sentence
    assert "no prediction changed" in [text.get_text() for axes in figure.axes for text in axes.texts]
    plt.close(figure)


def test_probabilities_of_other_images_are_refused():
    with pytest.raises(InputError, match=r"have the shape \(3, 3\); give \(2, 3\)"):
        changed_answers(np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1]), one_hot([0, 1, 2]), one_hot([0, 1]), "abc")
