"""From the settings' objective to the producer of its batches."""

from distill_datasets.training.objectives.producers import Lesson, Producer, SupervisedProducer


def producer_for(lesson: Lesson) -> Producer:
    """The producer of the settings' objective.

    "soft" and "on_policy" read the recipe in the release, and connect to its teacher: they raise
    `DatasetError` or `ModelError` where that can't be.
    """
    if lesson.settings.objective.name == "soft":
        from distill_datasets.training.objectives.soft import SoftProducer

        return SoftProducer(lesson)
    if lesson.settings.objective.name == "on_policy":
        from distill_datasets.training.objectives.on_policy import OnPolicyProducer

        return OnPolicyProducer(lesson)
    return SupervisedProducer(lesson)
