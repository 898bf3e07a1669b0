import pytest

from cegate.engine.results import best_iteration


def evaluation(iteration, first, second, *, classes=("background", "road"), domain="source"):
    scores = {name: {"IoU": value} for name, value in zip(classes, (first, second), strict=True)}
    mean = (first + second) / 2 if second is not None else first
    return {"split": "after", "iteration": iteration, "domain": domain, "mIoU": mean, "per_class": scores}


@pytest.mark.parametrize(
    ("classes", "counts"),
    [(("background", "road"), 20), (("field", "road"), 10)],
    ids=["a foreground leads", "classes alike"],
)
def test_what_leads_an_evaluation_chooses_the_model(classes, counts):
    records = [evaluation(10, 0.9, 0.4, classes=classes), evaluation(20, 0.7, 0.5, classes=classes)]
    assert best_iteration(records, "after", validated=True) == counts


def test_of_equals_the_earlier_one_counts_and_what_has_no_label_never_does():
    records = [evaluation(10, 0.9, None), evaluation(20, 0.7, 0.5), evaluation(30, 0.8, 0.5)]
    assert best_iteration(records, "after", validated=True) == 20
    assert best_iteration(records[:1], "after", validated=True) is None
    far = evaluation(40, 0.9, 0.9, domain="far")
    assert best_iteration([evaluation(30, 0.1, 0.1), far], "after", validated=True) == 30


def test_without_a_validation_set_the_last_one_counts():
    records = [evaluation(10, 0.9, 0.9, domain="far"), evaluation(20, 0.1, 0.1, domain="far")]
    assert best_iteration(records, "after", validated=False) == 20
